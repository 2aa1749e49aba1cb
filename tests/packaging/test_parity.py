"""Parity of graphs made by hand with onnx.helper, whose answers are known."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from comkd_cli.errors import ExportError
from comkd_cli.packaging.parity import Parity, measure_parity
from comkd_cli.packaging.runner import run_graph

DIM, SIZE = 4, 2


def write_graph(path: Path, matrix: np.ndarray, *, unit: bool, batch: int | str = "batch") -> Path:
    """flatten(image) @ matrix, L2-normalised if asked for."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "matrix"], ["product"]),
    ]
    if unit:
        nodes.append(helper.make_node("LpNormalization", ["product"], ["out"], axis=1, p=2))
    else:
        nodes.append(helper.make_node("Identity", ["product"], ["out"]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, matrix.shape[1]])
    weights = onnx.numpy_helper.from_array(matrix.astype(np.float32), "matrix")
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], [out], [weights]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    onnx.save(model, path)
    return path


@pytest.fixture
def case(tmp_path: Path) -> dict[str, object]:
    random = np.random.default_rng(0)
    images = random.normal(size=(10, 3, SIZE, SIZE)).astype(np.float32)
    encoding, classes = random.normal(size=(12, DIM)), random.normal(size=(12, 3))
    features = images.reshape(10, -1) @ encoding
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    return {
        "encoder": write_graph(tmp_path / "encoder.onnx", encoding, unit=True),
        "classifier": write_graph(tmp_path / "classifier.onnx", classes, unit=False),
        "images": images,
        "features": features,
        "logits": images.reshape(10, -1) @ classes,
    }


def test_graphs_that_answer_alike_hold(case: dict[str, object]) -> None:
    parity = measure_parity(**case)  # type: ignore[arg-type]
    assert parity.holds
    assert parity.feature_difference_max < 1e-5
    assert parity.batch_sizes == (1, 2, 7)


def test_a_feature_that_differs_is_measured_and_fails(case: dict[str, object]) -> None:
    case["features"] = case["features"].copy()  # type: ignore[attr-defined]
    case["features"][3, 2] += 0.01  # type: ignore[index]
    parity = measure_parity(**case)  # type: ignore[arg-type]
    assert parity.feature_difference_max == pytest.approx(0.01, rel=1e-3)
    assert not parity.holds
    assert "limit 1e-04" in parity.figures()


def test_another_top_class_is_counted_at_every_batch_size(case: dict[str, object]) -> None:
    logits = case["logits"].copy()  # type: ignore[attr-defined]
    logits[5] = -logits[5]
    parity = measure_parity(**{**case, "logits": logits})  # type: ignore[arg-type]
    assert parity.top1_differing == 3
    assert not parity.holds


def test_figures_that_are_no_numbers_fail(case: dict[str, object]) -> None:
    broken = np.full((12, DIM), np.nan)
    write_graph(case["encoder"], broken, unit=True)  # type: ignore[arg-type]
    parity = measure_parity(**case)  # type: ignore[arg-type]
    assert parity.feature_difference_max == float("inf")
    assert not parity.holds


def test_a_graph_fixed_to_one_batch_size_is_an_error(case: dict[str, object], tmp_path: Path) -> None:
    fixed = write_graph(tmp_path / "fixed.onnx", np.ones((12, DIM)), unit=True, batch=2)
    with pytest.raises(ExportError, match=r"fixed\.onnx: onnxruntime can't run it"):
        measure_parity(**{**case, "encoder": fixed})  # type: ignore[arg-type]


def test_a_child_that_dies_is_an_error_with_its_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -SEGV $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(ExportError, match="signal 11"):
        run_graph(tmp_path / "graph.onnx", {"1/0": np.zeros((1, 3, 2, 2), np.float32)})


@pytest.mark.parametrize(
    ("difference", "cosine", "differing", "holds"),
    [(1e-4, 0.99999, 0, True), (1.1e-4, 1.0, 0, False), (0.0, 0.99998, 0, False), (0.0, 1.0, 1, False)],
)
def test_limits(difference: float, cosine: float, differing: int, holds: bool) -> None:
    assert Parity(4, (1, 2, 7), difference, cosine, differing).holds is holds
