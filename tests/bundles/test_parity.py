"""Parity of graphs made by hand with onnx.helper, whose answers are known."""

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from comkd_cli.bundles.gates import GATES, Gate
from comkd_cli.bundles.parity import Parity, Reference, measure_parity
from comkd_cli.bundles.runner import run_graph
from comkd_cli.errors import ExportError

DIM, SIZE = 4, 2


def write_graph(path: Path, matrix: np.ndarray, *, unit: bool, batch: int | str = "batch") -> Path:
    """flatten(image) @ matrix, L2-normalised with `unit`."""
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
def graphs(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    encoder = write_graph(tmp_path / "encoder.onnx", random.normal(size=(12, DIM)), unit=True)
    return encoder, write_graph(tmp_path / "classifier.onnx", random.normal(size=(12, 3)), unit=False)


def reference(images: int = 10, labelled: bool = False) -> Reference:
    """What the graphs of the fixture should answer, computed here."""
    random = np.random.default_rng(0)
    encoding, classes = random.normal(size=(12, DIM)), random.normal(size=(12, 3))
    pictures = random.normal(size=(images, 3, SIZE, SIZE)).astype(np.float32)
    features = pictures.reshape(images, -1) @ encoding
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    logits = (pictures.reshape(images, -1) @ classes).astype(np.float32)
    return Reference(pictures, features, logits, logits.argmax(axis=1) if labelled else None)


def test_graphs_that_answer_alike_hold(graphs: tuple[Path, Path]) -> None:
    parity = measure_parity(*graphs, reference(labelled=True))
    assert parity.failures(GATES["fp32"]) == []
    assert parity.feature_difference_max < 1e-5
    assert parity.batch_sizes == (1, 2, 7)
    assert (parity.student_top1_percent, parity.top1_percent, parity.top1_agreement_percent) == (100, 100, 100)


@pytest.mark.slow
def test_images_beyond_the_first_64_are_compared_too(graphs: tuple[Path, Path]) -> None:
    whole = reference(150)
    assert measure_parity(*graphs, whole).failures(GATES["fp32"]) == []
    features, logits = whole.features.copy(), whole.logits.copy()
    features[140, 2] += 0.01
    logits[149] = -logits[149]
    parity = measure_parity(*graphs, replace(whole, features=features, logits=logits))
    assert parity.feature_difference_max == pytest.approx(0.01, rel=1e-3)
    assert parity.top1_agreement_percent == pytest.approx(100 * 149 / 150)


def test_a_feature_that_differs_is_measured_and_fails(graphs: tuple[Path, Path]) -> None:
    whole = reference()
    features = whole.features.copy()
    features[3, 2] += 0.01
    parity = measure_parity(*graphs, replace(whole, features=features))
    assert parity.feature_difference_max == pytest.approx(0.01, rel=1e-3)
    assert any("limit 1e-04" in failure for failure in parity.failures(GATES["fp32"]))


def test_lost_top1_is_measured_in_points(graphs: tuple[Path, Path]) -> None:
    whole = reference(100, labelled=True)
    logits = whole.logits.copy()
    logits[:3] = -logits[:3]  # the graph answers the other way on three images, which it then gets wrong
    parity = measure_parity(*graphs, replace(whole, logits=logits, labels=logits.argmax(axis=1)))
    assert parity.top1_loss_points == pytest.approx(3)
    assert parity.top1_agreement_percent == pytest.approx(97)
    (agreement, loss) = parity.failures(Gate(0.9, 98.0, 1.0))
    assert "97.00 % (limit 98 %)" in agreement
    assert "3.00 points (limit 1)" in loss


def test_figures_that_are_not_finite_fail(graphs: tuple[Path, Path]) -> None:
    write_graph(graphs[0], np.full((12, DIM), np.nan), unit=True)
    parity = measure_parity(*graphs, reference())
    assert parity.feature_difference_max == float("inf")
    assert parity.feature_cosine_min == -1
    assert parity.failures(GATES["int8"])
    assert parity.failures(Gate(-1, 0, 100)) == ["features that are not finite"]


def test_a_graph_fixed_to_one_batch_size_is_an_error(graphs: tuple[Path, Path], tmp_path: Path) -> None:
    fixed = write_graph(tmp_path / "fixed.onnx", np.ones((12, DIM)), unit=True, batch=2)
    with pytest.raises(ExportError) as caught:
        measure_parity(fixed, graphs[1], reference())
    assert (caught.value.path, caught.value.found, caught.value.allowed) == ("fixed.onnx", 2, "any")


def test_graphs_of_a_fixed_batch_are_compared_in_batches_of_that_length(tmp_path: Path) -> None:
    whole, random = reference(10), np.random.default_rng(0)
    pair = (  # ten images: the last batch is filled up
        write_graph(tmp_path / "encoder.onnx", random.normal(size=(12, DIM)), unit=True, batch=4),
        write_graph(tmp_path / "classifier.onnx", random.normal(size=(12, 3)), unit=False, batch=4),
    )
    parity = measure_parity(*pair, replace(whole, batch=4))
    assert (parity.batch_sizes, parity.images, parity.top1_agreement_percent) == ((4,), 10, 100)
    assert parity.feature_difference_max < 1e-5
    with pytest.raises(ExportError) as caught:
        measure_parity(*pair, replace(whole, batch=3))
    assert (caught.value.found, caught.value.allowed) == (4, "3")


def test_a_child_that_dies_is_an_error_with_its_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -SEGV $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(ExportError, match="signal 11"):
        run_graph(tmp_path / "graph.onnx", {"1/0": np.zeros((1, 3, 2, 2), np.float32)})


def test_logits_that_are_not_finite_agree_with_no_class(graphs: tuple[Path, Path]) -> None:
    """argmax gives the index of a NaN, which must not count as that class."""
    whole = reference(10, labelled=True)
    write_graph(graphs[1], np.full((12, 3), np.nan), unit=False)
    logits = whole.logits.copy()
    logits[:, 0] = 100
    parity = measure_parity(*graphs, replace(whole, logits=logits, labels=np.zeros(10, np.int64)))
    assert (parity.student_top1_percent, parity.top1_percent, parity.top1_agreement_percent) == (100, 0, 0)


def test_no_images_are_an_error(graphs: tuple[Path, Path]) -> None:
    with pytest.raises(ExportError, match="there are no images") as caught:
        measure_parity(*graphs, replace(reference(), images=reference().images[:0]))
    assert (caught.value.path, caught.value.remedy) == ("encoder.onnx", "provide some with --images")


def headed(graphs: tuple[Path, Path], scale: float) -> Reference:
    """The output of a student with logits = features @ class vectors; the classifier's are scale times those."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(DIM, 3)).astype(np.float32)
    whole = reference()
    nodes = onnx.load(graphs[0])
    nodes.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(scale) * vectors, "vectors"))
    nodes.graph.node.append(helper.make_node("MatMul", ["out", "vectors"], ["logits"]))
    del nodes.graph.output[:]
    nodes.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3]))
    onnx.save(nodes, graphs[1])
    return replace(whole, logits=whole.features @ vectors, head=vectors)


@pytest.mark.slow
def test_logits_of_another_scale_are_an_error_although_every_answer_agrees(graphs: tuple[Path, Path]) -> None:
    assert measure_parity(*graphs, headed(graphs, 1)).failures(GATES["fp32"]) == []
    whole = headed(graphs, 0.5)
    assert measure_parity(*graphs, replace(whole, head=None)).top1_agreement_percent == 100
    with pytest.raises(ExportError, match=r"its logits are not logit_scale \* features") as caught:
        measure_parity(*graphs, whole)
    assert caught.value.path == "classifier.onnx"


@pytest.mark.slow
def test_intervals_go_by_the_images_that_differ(graphs: tuple[Path, Path]) -> None:
    parity = measure_parity(*graphs, reference(40, labelled=True))
    assert parity.top1_agreement_interval_percent == pytest.approx((91.24, 100), abs=0.01)
    assert parity.top1_interval_percent == parity.top1_agreement_interval_percent
    few = measure_parity(*graphs, replace(reference(40), different=8))
    assert few.top1_agreement_interval_percent == pytest.approx((67.56, 100), abs=0.01)
    assert few.top1_interval_percent is None
    assert few.document()["top1_agreement_interval_percent"] == few.top1_agreement_interval_percent
    assert "(95 % interval 67.6 to 100.0 %)" in few.figures()


def test_a_full_disk_is_not_the_graphs_fault(graphs: tuple[Path, Path]) -> None:
    limited = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np\n"
        "from comkd_cli.bundles import runner\n"
        "import os; real = runner.subprocess.run\n"
        "def run(*given, **named):\n"
        "    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "    return real(*given, **named, preexec_fn=limit)\n"
        "runner.subprocess.run = run\n"
        "try:\n"
        "    runner.run_graph(Path(sys.argv[1]), {'1': np.zeros((9, 3, 2, 2), np.float32)})\n"
        "except OSError as error:\n"
        "    print(error.errno, error.strerror)\n"
    )
    command = [sys.executable, "-c", limited, str(graphs[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"{errno.EFBIG} File too large\n"
    assert {path.name for path in graphs[0].parent.iterdir()} == {"encoder.onnx", "classifier.onnx"}


@pytest.mark.parametrize(
    ("precision", "difference", "cosine", "agreement", "loss", "missed"),
    [
        ("fp32", 1e-4, 0.99999, 100.0, 0.1, 0),
        ("fp32", 1.1e-4, 0.99998, 99.9, 0.11, 4),
        ("fp16", 0.5, 0.9995, 99.5, 0.2, 0),
        ("fp16", 0.5, 0.9994, 99.4, 0.21, 3),
        ("int8", 0.5, 0.98, 98.0, 1.0, 0),
        ("int8", 0.5, 0.979, 97.9, 1.01, 3),
    ],
)
def test_gates(precision: str, difference: float, cosine: float, agreement: float, loss: float, missed: int) -> None:
    parity = Parity(4, (1, 2, 7), difference, cosine, 1.0, agreement, loss, 0.0)
    assert len(parity.failures(GATES[precision])) == missed
