"""That the benchmarks still run against the code; what they measure is not tested."""

import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from comkd_cli.bundles.latency import Timing

ROOT = Path(__file__).parent.parent
MODULES = [
    *sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"),
    *sorted(f"{path.parent.name}.__main__" for path in (ROOT / "benchmarks").glob("*/__main__.py")),
]


@pytest.fixture
def document_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `python -m benchmarks.NAME ARGUMENTS` in this process and returns the JSON that it prints."""

    def run(name: str, *arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(f"benchmarks.{name}").main()
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", MODULES)
def test_each_benchmark_loads_and_says_its_own_command(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main)
    assert f"python -m benchmarks.{name.removesuffix('.__main__')}" in module.__doc__


@pytest.mark.slow
def test_copies_of_photos_are_compared_with_torchvision_over_the_same_files(document_of: Callable[..., Any]) -> None:
    sizes = ["--photos", "6", "--photo-width", "1280", "--small", "6", "--small-width", "480", "--workers", "0"]
    document = document_of("photos", *sizes)
    for name, copy in (("photos", 355 * 473), ("small", 480 * 360)):  # 355 = ceil(224 / sqrt(0.4)); 360 is kept whole
        found = document[name]
        assert found["images"] == 6
        assert found["bytes_of_a_copy"] == copy * 3 + 28
        rates, ratios = found["images_per_second"], found["over_torchvision"]
        assert ratios["first_epoch"] == pytest.approx(rates["first_epoch"] / rates["torchvision"][0])
        assert ratios["later_epochs"] == pytest.approx(rates["later_epochs"] / rates["torchvision"][1])
        assert 0 < found["difference_of_crops"]["copies"] < found["difference_of_crops"]["jpeg_95"]


def test_the_loaders_ratios_are_quotients_of_the_rates_beside_them(document_of: Callable[..., Any]) -> None:
    sizes = ["--images", "8", "--side", "48", "--batch", "4", "--workers", "0", "--rounds", "1"]
    document = document_of("loader", *sizes)
    rates, ratios = document["images_per_second"], document["over_torchvision"]
    assert set(rates) == set(ratios) > {"torchvision", "comkd"}
    assert all(rate > 0 for rate in rates.values())
    assert ratios == pytest.approx({name: rate / rates["torchvision"] for name, rate in rates.items()})
    assert document["images_of_an_epoch"] == dict.fromkeys(rates, 8)  # all did the same work
    assert document["mean_file_bytes"] > 0


def test_int8_is_compared_with_what_onnxruntime_makes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = importlib.import_module("benchmarks.latency")
    weights = np.random.default_rng(0).standard_normal((48, 512), dtype=np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["image_features"]),
    ]
    ends = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4]),
        helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["batch", 512]),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weights, "weights")])
    for name in ("fp32", "int8"):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, tmp_path / f"{name}.onnx")
    seconds = {"fp32": 4.0, "int8": 1.0, "quantize_dynamic": 2.0, "quantize_static": 8.0}
    monkeypatch.setattr(
        latency,
        "single_thread_timings",
        lambda graphs, *_: {graph.name: Timing(*[seconds[graph.name]] * 3) for graph in graphs},
    )
    manifest = {"precisions": {name: {"image_encoder": f"{name}.onnx"} for name in ("fp32", "int8")}}
    figures = latency.against_plain(tmp_path, manifest, 4)
    speeds = {name: entry["speed_over_fp32"] for name, entry in figures.items()}
    assert speeds == {"fp32": 1, "int8": 4, "quantize_dynamic": 2, "quantize_static": 0.5}
    # A byte for each weight of four, beside what is the same in all.
    assert 0.2 < figures["quantize_dynamic"]["size_over_fp32"] < 0.4
    assert figures["int8"]["size_over_fp32"] == 1


def test_neighbours_are_compared_within_each_round() -> None:
    from benchmarks.neighbours import compared

    def found(default: tuple[float, float], comkd: tuple[float, float]) -> dict[str, dict[str, float]]:
        by_setting = {"default": default, "comkd": comkd}
        return {name: {"alone": alone, "two": two} for name, (alone, two) in by_setting.items()}

    # The machine was half as fast in the second round, and the third was disturbed.
    document = compared([found((100, 5), (95, 90)), found((50, 2.5), (47.5, 45)), found((100, 5), (10, 1))])
    assert document["alone"] == pytest.approx(0.95)
    assert document["together"] == pytest.approx(90 / 95)
    assert document["together_by_default"] == pytest.approx(0.05)
    assert document["images_per_second"]["default"] == {"alone": 100, "two": 5}


@pytest.mark.slow
def test_a_neighbour_counts_its_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import neighbours

    monkeypatch.setattr(neighbours, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    monkeypatch.setattr(sys, "argv", ["neighbours", "--child", "graph", "--setting", "comkd", "--seconds", "0.1"])
    neighbours.main()
    ready, rate = capsys.readouterr().out.split()
    assert ready == "ready"
    assert 0 < float(rate) < 1e6


@pytest.mark.slow
def test_every_section_for_a_gpu_runs_with_small_models_on_a_cpu(document_of: Callable[..., Any]) -> None:
    from benchmarks.gpu import __main__ as gpu

    document = document_of("gpu.__main__", "--tiny", "--seconds", "0.01")
    assert document["left_out"] == []
    assert not [name for name in gpu.SECTIONS if "failed" in (document[name] or {})]
    for pair in document["steps"].values():
        rows, arithmetic = pair["batches"]["8"], pair["flops_per_image"]
        rates = {name: rows[name]["images_per_second"] for name in arithmetic}
        assert min(*rates.values(), rows["loop"]["images_per_second"]) > 0
        assert rows["over_student_only"]["cache_warm"] == pytest.approx(rates["cache_warm"] / rates["student_only"])
        # Of the teacher a warm cache leaves the logits, 100 classes of 16 dimensions; the reference has prompts too.
        assert arithmetic["cache_warm"] - arithmetic["student_only"] == 2 * 100 * 16
        assert arithmetic["cache_warm"] < arithmetic["no_cache"] < arithmetic["reference"]
    assert document["cache"]["filling"]["images_per_second"] > 0
    assert document["stage_1"].keys() == {"5", "70"}
    assert document["few_shot"].keys() == {"linear-probe", "tip-adapter", "tip-adapter-f"}


def test_a_gpu_benchmark_without_time_lists_what_it_left_out(document_of: Callable[..., Any]) -> None:
    document = document_of("gpu.__main__", "--tiny", "--minutes", "0", "--only", "cache", "few_shot")
    assert document["left_out"] == ["cache", "few-shot"]
    assert "steps" not in document


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("unknown", None),
    ],
)
def test_the_peak_of_a_card_is_found_by_its_name(card: str, peak: float | None) -> None:
    from benchmarks.gpu.measure import bf16_peak

    assert bf16_peak(card) == peak


def test_the_few_shot_benchmark_compares_equal_work(document_of: Callable[..., Any]) -> None:
    sizes = ["--classes", "6", "--dim", "32", "--test", "300", "--shots", "1", "2", "--seeds", "1"]
    document = document_of("few_shot", *sizes, "--no-val", "--reference-shots", "2")
    assert document["seconds_in_all"] == pytest.approx(sum(document["seconds"].values()))
    for figures in document["compared"]["2"].values():
        assert figures["over_reference"] == pytest.approx(figures["seconds"] / figures["reference_seconds"])
        assert figures["equal_answers_percent"] >= 99
        assert abs(figures["top1_difference_points"]) <= 1
        assert figures["top1_percent"] > 1.3 * 100 / 6  # there is something to learn
