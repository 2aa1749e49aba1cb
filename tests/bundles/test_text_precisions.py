from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from comkd_cli.bundles.gates import TEXT_GATE
from comkd_cli.bundles.text_precisions import (
    CHOOSE_NAMES,
    GATE_NAMES,
    TextComparison,
    quantise_tables,
    text_vectors,
    write_text_graph,
)
from comkd_cli.errors import ExportError

TOKENS, WIDTH = 200, 48


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that sums the vectors of tokens and multiplies the sum with a matrix; some vectors are small."""
    random = np.random.default_rng(0)
    table = random.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    table[::2] /= 100
    matrix = random.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["vectors"]),
        helper.make_node("ReduceMean", ["vectors", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "matrix"], ["product"]),
        helper.make_node("LpNormalization", ["product"], ["text_features"], axis=-1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["texts", 5])],
        [helper.make_tensor_value_info("text_features", TensorProto.FLOAT, ["texts", WIDTH])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(matrix, "matrix"),
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
        ],
    )
    path = tmp_path_factory.mktemp("graphs") / "text_encoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def some_tokens(count: int, step: int = 1) -> np.ndarray:
    """int64 (count, 5). step: 2 for tokens of small vectors alone; otherwise each text has one of another."""
    tokens = np.random.default_rng(count).integers(0, TOKENS // step, (count, 5)) * step
    if step == 1:
        tokens[:, 0] |= 1  # onnxruntime quantises a batch of activations with one scale
    return tokens


def run(model: onnx.ModelProto, tokens: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"tokens": tokens})[0])


def test_each_token_has_a_scale_of_its_own(encoder: Path) -> None:
    """With one scale for the table, tokens of small vectors alone would have almost nothing left."""
    exact, small = onnx.load(encoder), quantise_tables(onnx.load(encoder))
    onnx.checker.check_model(small, full_check=True)
    for tokens in (some_tokens(64), some_tokens(64, step=2)):
        cosines = np.sum(run(exact, tokens) * run(small, tokens), axis=1)
        assert cosines.min() > 0.999
    kinds = {entry.name: entry.data_type for entry in small.graph.initializer}
    assert kinds["table.levels"] == TensorProto.INT8
    assert "table" not in kinds


def test_a_table_that_is_used_otherwise_stays(encoder: Path) -> None:
    model = onnx.load(encoder)
    model.graph.node.append(helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]))
    assert {entry.name for entry in quantise_tables(model).graph.initializer} == {"table", "matrix", "axes"}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least", "share"), [("fp16", 0.9999, 0.6), ("int8", 0.995, 0.45)])
def test_graphs_in_fewer_bits_are_close_and_smaller(
    encoder: Path, tmp_path: Path, precision: str, least: float, share: float
) -> None:
    source, target = tmp_path / "text_encoder.onnx", tmp_path / f"text_encoder.{precision}.onnx"
    source.write_bytes(encoder.read_bytes())
    method = write_text_graph(precision, source, target, some_tokens(16))
    assert method in ({None} if precision == "fp16" else {"dynamic-signed", "dynamic-unsigned"})
    assert {path.name for path in tmp_path.iterdir()} == {source.name, target.name}
    tokens = some_tokens(100)
    exact = text_vectors(source, tokens, "all")
    np.testing.assert_allclose(exact, run(onnx.load(source), tokens), atol=1e-6)
    cosines = np.sum(exact * text_vectors(target, tokens, "basic"), axis=1)
    assert cosines.min() > least
    assert target.stat().st_size < share * source.stat().st_size


def test_a_graph_that_cannot_be_quantised_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "text_encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError):
        write_text_graph("int8", tmp_path / "text_encoder.onnx", tmp_path / "out.onnx", some_tokens(16))
    assert [path.name for path in tmp_path.iterdir()] == ["text_encoder.onnx"]


def test_names_that_choose_are_not_those_of_the_gate() -> None:
    assert not set(CHOOSE_NAMES) & set(GATE_NAMES)
    assert len(set(GATE_NAMES)) == len(GATE_NAMES) >= 40


def test_figures_and_what_they_miss() -> None:
    """Three names, of which two are classes; the vector of the third is 10 degrees off."""
    angles = np.radians([[0, 90, 45], [0, 90, 55]])
    expected, found = (np.stack([np.cos(row), np.sin(row)], axis=1) for row in angles)
    images = np.array([[1.0, 0.1], [0.1, 1.0]])
    comparison = TextComparison(np.zeros((3, 5), np.int64), expected, 2, images)
    figures = comparison.figures(found)
    assert figures.cosine_min == pytest.approx(np.cos(np.radians(10)))
    assert figures.cosine_mean == pytest.approx((2 + np.cos(np.radians(10))) / 3)
    assert (figures.agreement_percent, figures.names, figures.images) == (100, 3, 2)
    (missed,) = figures.failures(TEXT_GATE)
    assert missed == "smallest cosine 0.98481 of 3 names (limit 0.995)"
    swapped = comparison.figures(expected[[1, 0, 2]])
    assert len(swapped.failures(TEXT_GATE)) == 2
    assert comparison.figures(expected * np.nan).cosine_min == -1
