"""`comkd evaluate` beside clip-benchmark: the predictions and the time of each, in paired processes.

    pip install clip-benchmark --no-deps; pip install webdataset requests pycocoevalcap --no-deps
    python -m benchmarks.evaluate --folder FOLDER [--arch ViT-S-32-alt] [--weights FILE] [--pairs 2]

FOLDER holds test/<class>/. Without --weights the model is random, drawn once and read by both from one file:
arithmetic and time, which are compared, are the same as with trained weights. Both programs run in fp32 as whole
processes, one after the other, without kept features. Prints one JSON
document: top-1 of both, seconds of both, and the ratio of their medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEMPLATE = "a photo of a {}."
PEER_DATASET = "imagenet1k-unverified"  # clip-benchmark's name for a folder with one sub-folder per class


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--arch", default="ViT-S-32-alt")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        weights = options.weights or random_weights(options.arch, scratch)
        ours: list[tuple[float, float]] = []
        peers: list[tuple[float, float]] = []
        for pair in range(options.pairs):  # the order alternates, so that neither always reads warm files
            programs = [(ours, _comkd), (peers, _peer)]
            for measured, program in programs if pair % 2 == 0 else reversed(programs):
                measured.append(program(options.folder.resolve(), options.arch, weights, scratch, pair))
    seconds = {"comkd": [s for _, s in ours], "clip_benchmark": [s for _, s in peers]}
    medians = {program: statistics.median(measured) for program, measured in seconds.items()}
    document = {
        "arch": options.arch,
        "top1": {"comkd": ours[0][0], "clip_benchmark": peers[0][0]},
        "seconds": seconds,
        "comkd_over_clip_benchmark": medians["comkd"] / medians["clip_benchmark"],
    }
    print(json.dumps(document, indent=2))


def random_weights(arch: str, scratch: Path) -> Path:
    """A file with random weights of an architecture of open_clip."""
    import torch

    from comkd_cli.models.backbones import build_clip
    from comkd_cli.recipe.model import Model

    path = scratch / "random.pt"
    torch.save(build_clip(Model(arch=arch), seed=1).model.state_dict(), path)
    return path


def _comkd(folder: Path, arch: str, weights: Path, scratch: Path, run: int) -> tuple[float, float]:
    """(top-1 as a share, seconds)."""
    command = ["-m", "comkd_cli", "evaluate", f"{arch}:{weights}", "--folder", str(folder), "--template", TEMPLATE]
    said, seconds = timed([*command, "--runs", str(scratch / f"runs{run}"), "--json"])
    (record,) = json.loads(said)["records"]
    return record["top1_percent"] / 100, seconds


def _peer(folder: Path, arch: str, weights: Path, scratch: Path, run: int) -> tuple[float, float]:
    """(top-1 as a share, seconds)."""
    root = scratch / f"peer{run}"
    root.mkdir()
    (root / "val").symlink_to(folder / "test")
    classes = sorted(path.name for path in (folder / "test").iterdir())
    names, templates, found = root / "names.json", root / "templates.json", root / "found.json"
    names.write_text(json.dumps({PEER_DATASET: classes}))
    templates.write_text(json.dumps({PEER_DATASET: [TEMPLATE.replace("{}", "{c}")]}))
    command = ["-m", "clip_benchmark.cli", "eval", "--dataset", PEER_DATASET, "--dataset_root", str(root)]
    command += ["--model", arch, "--pretrained", str(weights), "--task", "zeroshot_classification", "--no_amp"]
    command += ["--custom_classname_file", str(names), "--custom_template_file", str(templates)]
    _, seconds = timed([*command, "--output", str(found)])
    metrics: dict[str, Any] = json.loads(found.read_text())["metrics"]
    return metrics["acc1"], seconds


def timed(arguments: list[str]) -> tuple[str, float]:
    """What a whole Python process printed, and its seconds. Ends this program if it failed."""
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(arguments[:2])} failed:\n{finished.stderr}")
    return finished.stdout, time.perf_counter() - started


if __name__ == "__main__":
    main()
