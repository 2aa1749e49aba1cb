"""Exported students beside eager PyTorch: speed, size and memory of each precision, as `comkd export` measures them.

    python -m benchmarks.latency [--recipe vitl_to_vit_tiny] [--precision fp16 int8] [--check-images 32]
    python -m benchmarks.latency --student STUDENT.pt [--data-root DATA | --images FOLDER] [--precision fp16 int8]

Without --student a recipe's student is built with random weights for the bundled digits, on which its graphs are then
checked. Its gates are open: its predictions are close to ties, so their agreement means nothing. With --student the
gates are those of `comkd export`; a precision that misses its own is listed under `left_out`. fp32 is always included,
as the reference for sizes. Prints one JSON document: for each precision its size relative to fp32's and,
for each number of threads, milliseconds of one image, speed-up over eager fp32 PyTorch and share of PyTorch's peak
memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from comkd_cli.bundles.gates import GATES, Gate
from comkd_cli.data.digits import digits_source
from comkd_cli.events import Event, Notice, Stage
from comkd_cli.flows.distill import outline
from comkd_cli.flows.export import ExportOptions, export
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_image_tower
from comkd_cli.models.checkpoints import StudentRecord, load_student_record, save_student
from comkd_cli.recipe import load_recipe

OPEN_GATE = Gate(cosine_min=-1.0, agreement_min_percent=0.0, top1_loss_max_points=100.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--recipe", default="vitl_to_vit_tiny")
    parser.add_argument("--precision", nargs="+", choices=list(GATES), default=["fp16", "int8"])
    parser.add_argument("--check-images", type=int, default=32)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    options = ExportOptions(
        precisions=list(dict.fromkeys(["fp32", *options.precision])),
        benchmark=True,
        gates=GATES if options.student else dict.fromkeys(GATES, OPEN_GATE),
        check_images=options.check_images,
        pictures=options.images,
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        student = options.student or random_student(options.recipe, scratch / "student.pt")
        exported = export(student, scratch / "bundle", options.data_root, _tell, options=options)
        record = load_student_record(student)
    manifest = exported.manifest
    document = {
        "student": record.recipe_name if options.student else f"{options.recipe}, random weights",
        "parameters": manifest["parameters"],
        "size_pixels": record.preprocessing.size,
        "pytorch": _by_threads(manifest, "pytorch"),
        "precisions": {
            precision: {
                "size_over_fp32": _size_over_fp32(manifest, precision),
                "threads": _by_threads(manifest, precision),
            }
            for precision in manifest["precisions"]
        },
        "left_out": exported.failed,
    }
    print(json.dumps(document, indent=2))


def random_student(recipe_name: str, path: Path) -> Path:
    """A checkpoint of the recipe's student with random weights, as if it had been trained on the digits."""
    recipe = load_recipe(recipe_name, ["data.dataset=digits"])
    if recipe.student.train != "full":
        sys.exit(f"{recipe_name}: its student has pretrained weights; give a trained one with --student")
    digits = digits_source(recipe.data.template)
    tower = build_image_tower(recipe.student, seed=1, load_weights=False)
    classes = len(digits.class_names)
    torch.manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(classes, outline(recipe, classes).teacher_dim), dim=-1)
    student = Student(
        tower.module, tower.width, vectors, torch.tensor(100.0), recipe.student, recipe.loss.edu_attention
    )
    record = StudentRecord(
        recipe=recipe,
        recipe_name=recipe_name,
        source=digits.name,
        class_names=digits.class_names,
        template=digits.template,
        preprocessing=tower.preprocessing,
        backbone=tower.origin,
        backbone_sha256=None,
        teacher=None,
        identity="",
        metrics={},
    )
    save_student(path, student, record)
    return path


def _tell(event: Event) -> None:
    """Print a notice or stage to standard error."""
    if isinstance(event, Stage):
        print(event.title, file=sys.stderr)
    elif isinstance(event, Notice):
        print(event.text, file=sys.stderr)


def _size_over_fp32(manifest: dict[str, Any], precision: str) -> float | None:
    """None if a trained student's fp32 graph missed its gate and is not in the bundle."""
    sizes = {p: manifest["files"][graphs["classifier"]]["bytes"] for p, graphs in manifest["precisions"].items()}
    return sizes[precision] / sizes["fp32"] if "fp32" in sizes else None


def _by_threads(manifest: dict[str, Any], name: str) -> dict[int, dict[str, float]]:
    return {
        entry["threads"]: {
            "milliseconds": 1e3 * entry["seconds"],
            "speed_up": entry["speed_up"],
            "memory_share": entry["memory_share"],
        }
        for entry in manifest["latency"]
        if entry["name"] == name
    }


if __name__ == "__main__":
    main()
