"""The whole path on bundled images: distil, score, export, use; `make demo` runs it.

Runs the commands that a user types, prints each before it runs, and ends with a table of the results.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from comkd_cli.data.digits import digits_source

RUNS = Path("runs")
RUN = RUNS / "digits" / "digits" / "seed1"
IMAGES = RUNS / "demo"


def comkd(*arguments: str) -> None:
    """Run a comkd command with the demo's own output; a failure ends the demo with its exit code."""
    console.print(f"\n[bold cyan]$ comkd {' '.join(arguments)}[/bold cyan]")
    with subprocess.Popen([sys.executable, "-m", "comkd_cli", *arguments]) as process:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue  # comkd received Ctrl-C too, and saves a checkpoint
    if code:
        sys.exit(code)


def comkd_json(*arguments: str) -> dict:
    """The JSON document that a comkd command prints."""
    command = [sys.executable, "-m", "comkd_cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def save_images() -> dict[str, str]:
    """Ten test digits as PNG files, evenly spaced; returns the true class of each by its path."""
    test = digits_source().test
    IMAGES.mkdir(parents=True, exist_ok=True)
    truth = {}
    for index in range(0, len(test), len(test) // 10):
        path = IMAGES / f"test-{test.keys[index]}.png"
        test.open(index).save(path)
        truth[str(path)] = str(test.labels[index])
    return truth


def summary(truth: dict[str, str], seconds: float) -> Table:
    """The results, from the files that the commands wrote."""
    student, teacher = json.loads((RUN / "results.json").read_text())["records"]
    manifest = json.loads((RUN / "bundle" / "manifest.json").read_text())
    predictions = comkd_json("predict", str(RUN / "bundle"), *truth)["predictions"]
    right = sum(entry["classes"][0]["class"] == truth[entry["image"]] for entry in predictions)
    smaller = teacher["image_tower_parameters"] / student["image_tower_parameters"]
    kept = 100 * student["top1_percent"] / teacher["top1_percent"]
    table = Table("", "teacher", "student", title="Results", title_justify="left")
    table.add_row(
        "image tower, parameters",
        f"{teacher['image_tower_parameters']:,}",
        f"{student['image_tower_parameters']:,}  (1/{smaller:.1f})",
    )
    table.add_row(
        f"top-1 on {student['images']} test images",
        f"{teacher['top1_percent']:.2f} %",
        f"{student['top1_percent']:.2f} %  ({kept:.1f} % of the teacher's)",
    )
    table.add_row("agreement of the two", "", f"{student['agreement_percent']:.2f} %")
    table.add_row("classifier.onnx", "", f"{manifest['files']['classifier.onnx']['bytes']:,} bytes")
    parity = manifest["precisions"]["fp32"]["parity"]
    table.add_row("largest feature difference to PyTorch", "", f"{parity['feature_difference_max']:.1e}")
    table.add_row("demo images classified correctly", "", f"{right} of {len(truth)}")
    table.caption = f"{seconds:.0f} s; everything is in {RUN}/"
    table.caption_justify = "left"
    return table


def main() -> None:
    """Run the demo from the current directory."""
    started = time.monotonic()
    truth = save_images()
    comkd("distill", "digits", "--runs", str(RUNS))
    comkd("evaluate", str(RUN / "student.pt"))
    comkd("export", "--onnx", str(RUN / "student.pt"), "--force")
    comkd("predict", str(RUN / "bundle"), *truth, "--top", "1")
    console.print()
    console.print(summary(truth, time.monotonic() - started))


if __name__ == "__main__":
    console = Console(highlight=False)
    main()
