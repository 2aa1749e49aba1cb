"""Exported students beside eager PyTorch: speed, size and memory of each precision, as `comkd export` measures them.

    python -m benchmarks.latency [--recipe vitl_to_vit_tiny] [--precision fp16 int8] [--check-images 32]
    python -m benchmarks.latency --student STUDENT.pt [--data-root DATA | --images FOLDER] [--precision fp16 int8]
    python -m benchmarks.latency --plain [--recipe vitl_to_mobilenetv4]

Without --student a recipe's student is built with random weights for the bundled digits, on which its graphs are then
checked. Its gates are open: its predictions are close to ties, so their agreement means nothing. With --student the
gates are those of `comkd export`; a precision that misses its own is listed under `left_out`. fp32 is always included,
as the reference for sizes. Prints one JSON document: for each precision its size relative to fp32's and,
for each number of threads, milliseconds of one image, speed-up over eager fp32 PyTorch and share of PyTorch's peak
memory. --plain compares the int8 graph with those of onnxruntime's quantize_dynamic and quantize_static with their
defaults, on one thread, in alternation with fp32 (`plain`); random images calibrate the static one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.bundles.gates import GATES, Gate
from comkd_cli.bundles.graphs import IMAGE
from comkd_cli.bundles.latency import Contender, single_thread_timings
from comkd_cli.bundles.precisions import prepare_graph
from comkd_cli.bundles.runner import run_graph
from comkd_cli.data.digits import digits_source
from comkd_cli.edge.machine import cpu_name
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
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    options = ExportOptions(
        precisions=list(dict.fromkeys(["fp32", *arguments.precision])),
        benchmark=True,
        gates=GATES if arguments.student else dict.fromkeys(GATES, OPEN_GATE),
        check_images=arguments.check_images,
        pictures=arguments.images,
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        student = arguments.student or random_student(arguments.recipe, scratch / "student.pt")
        exported = export(student, scratch / "bundle", arguments.data_root, _tell, options=options)
        record = load_student_record(student)
        size = record.preprocessing.size
        plain = against_plain(scratch / "bundle", exported.manifest, size) if arguments.plain else None
    manifest = exported.manifest
    document = {
        "student": record.recipe_name if arguments.student else f"{arguments.recipe}, random weights",
        "cpu": cpu_name(),
        "parameters": manifest["parameters"],
        "size_pixels": size,
        "pytorch": _by_threads(manifest, "pytorch"),
        "precisions": {
            precision: {
                "size_over_fp32": _size_over_fp32(manifest, precision),
                "threads": _by_threads(manifest, precision),
            }
            for precision in manifest["precisions"]
        },
        "left_out": exported.failed,
        "plain": plain,
    }
    print(json.dumps(document, indent=2))


def against_plain(bundle: Path, manifest: dict[str, Any], size: int) -> dict[str, dict[str, float | None]]:
    """The bundle's int8 encoder beside onnxruntime's own quantisation, by name: speed and size relative to fp32's.

    bundle: its fp32 and int8 graphs need no input but the image, of `size` pixels. A graph that onnxruntime cannot make
    or run has None.
    """
    fp32 = bundle / manifest["precisions"]["fp32"]["image_encoder"]
    graphs = {"fp32": fp32}
    if "int8" in manifest["precisions"]:
        graphs["int8"] = bundle / manifest["precisions"]["int8"]["image_encoder"]
    prepared = bundle / "prepared.onnx"
    prepare_graph(fp32, prepared)
    failed = []
    for name, quantise in {"quantize_dynamic": _plain_dynamic, "quantize_static": _plain_static}.items():
        graph = bundle / f"{name}.onnx"
        try:
            quantise(prepared, graph, size)
            run_graph(graph, {"one": np.zeros((1, 3, size, size), np.float32)})  # or it is not timed
            graphs[name] = graph
        except Exception as error:  # of onnxruntime, of many types
            print(f"{name} failed: {error}", file=sys.stderr)
            failed.append(name)
    timings = single_thread_timings([Contender(name, path) for name, path in graphs.items()], size, {})
    reference = timings["fp32"].median
    figures: dict[str, dict[str, float | None]] = {
        name: {
            "speed_over_fp32": reference / timings[name].median,
            "size_over_fp32": path.stat().st_size / fp32.stat().st_size,
        }
        for name, path in graphs.items()
    }
    return figures | {name: {"speed_over_fp32": None, "size_over_fp32": None} for name in failed}


def _plain_dynamic(source: Path, target: Path, size: int) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(source), str(target))


def _plain_static(source: Path, target: Path, size: int) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no types
        """Eight random images, one after the other."""

        def __init__(self) -> None:
            generator = np.random.default_rng(0)
            images = generator.standard_normal((8, 1, 3, size, size), dtype=np.float32)
            self._remaining = iter([{IMAGE: image} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._remaining, None)

    quantize_static(str(source), str(target), Reader())


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
