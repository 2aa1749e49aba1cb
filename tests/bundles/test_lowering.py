"""Operators of opset 18 in older opsets: onnxruntime against ONNX's reference evaluator of the newer one."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from comkd_cli.bundles.lowering import NORM, lower
from comkd_cli.errors import ExportError

SHAPE = (2, 3, 4)
CONSTANTS = {
    "axes": np.array([1, 2]),
    "scale": np.array([0.5, 2, -1, 3], np.float32),
    "bias": np.array([1, 0, -2, 0.25], np.float32),
    "wide": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "channels": np.array([0.5, 2, 1], np.float32),
    "shape": np.array([0, -1]),
    "lengths": np.array([1, 3]),
    "true": np.array(True),
}


def node(op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, ["x", *inputs], [f"y{i}" for i in range(outputs)], **attributes)


def model(nodes: list[NodeProto], outputs: int, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    used = {name for each in nodes for name in each.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(f"y{i}", kind, None) for i in range(outputs)],
        [numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in used],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    # The checker wants the shapes of the outputs too.
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def run(lowered: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(lowered.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


REWRITTEN = {
    "layer norm": node("LayerNormalization", "scale", "bias", axis=-1, epsilon=0.01),
    "layer norm without bias": node("LayerNormalization", "scale"),
    "layer norm over two axes": node("LayerNormalization", "wide", axis=1),
    "mean over axes": node("ReduceMean", "axes", keepdims=0),
    "norm over axes": node("ReduceL2", "axes", keepdims=1),
    "maximum of all": node("ReduceMax"),
    "reduction over no axes": node("ReduceMean", noop_with_empty_axes=1),
    "split": node("Split", outputs=2, axis=2, num_outputs=2),
    "split by lengths": node("Split", "lengths", outputs=2, axis=2),
    "batch norm": node("BatchNormalization", "channels", "channels", "channels", "channels", training_mode=0),
    "reshape": node("Reshape", "shape", allowzero=0),
    "hard swish": node("HardSwish"),
    "mish": node("Mish"),
}


@pytest.mark.parametrize("opset", [13, 14, 17])
@pytest.mark.parametrize("each", REWRITTEN.values(), ids=REWRITTEN)
def test_older_operators_compute_the_same(each: NodeProto, opset: int) -> None:
    whole = model([each], len(each.output))
    x = 4 * np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    expected = ReferenceEvaluator(whole).run(None, {"x": x})
    lowered = lower(whole, opset)
    onnx.checker.check_model(lowered, full_check=True)
    assert [entry.version for entry in lowered.opset_import if not entry.domain] == [opset]
    for found, wanted in zip(run(lowered, x), expected, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 3), (-2, None)])
def test_a_part_of_a_shape_is_a_slice_of_it(start: int, end: int | None) -> None:
    attributes = {"start": start} | ({} if end is None else {"end": end})
    lowered = lower(model([node("Shape", **attributes)], 1, TensorProto.INT64), 13)
    onnx.checker.check_model(lowered, full_check=True)
    (found,) = run(lowered, np.zeros(SHAPE, np.float32))
    assert tuple(found) == SHAPE[start:end]


def test_reshape_to_a_computed_shape_needs_no_allowzero() -> None:
    """torch's exporter sets it wherever a shape is computed."""
    nodes = [
        helper.make_node("Shape", ["x"], ["all"]),
        helper.make_node("ReduceProd", ["all"], ["count"], keepdims=1),
        helper.make_node("Reshape", ["x", "count"], ["y0"], allowzero=1),
    ]
    lowered = lower(model(nodes, 1), 13)
    onnx.checker.check_model(lowered, full_check=True)
    assert run(lowered, np.zeros(SHAPE, np.float32))[0].shape == (24,)


@pytest.mark.parametrize(
    ("each", "opset", "least"),
    [
        (node("Resize", "", "", "lengths", antialias=1, mode="cubic", axes=[1, 2]), 17, 18),
        (node("Pad", "lengths", "", "axes"), 13, 18),
        (node("BatchNormalization", *["channels"] * 4, training_mode=1), 13, 15),
        (node("LayerNormalization", "scale", "bias", outputs=2), 16, 17),
        (node("CastLike", "scale"), 14, 15),
        (node("ReduceMean", "x"), 17, 18),
    ],
    ids=["antialias", "pad axes", "training", "mean as an output", "cast like", "computed axes"],
)
def test_an_operator_without_an_equivalent_is_named(each: NodeProto, opset: int, least: int) -> None:
    with pytest.raises(ExportError, match=f"the operator {each.op_type} of this model") as caught:
        lower(model([each], 1), opset)
    assert (caught.value.field, caught.value.found) == ("--opset", opset)
    assert caught.value.remedy == f"export with --opset {least} or later"


def test_branches_are_not_rewritten() -> None:
    branch = helper.make_graph(
        [helper.make_node("Mish", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    both = helper.make_node("If", ["true"], ["y0"], then_branch=branch, else_branch=branch)
    with pytest.raises(ExportError, match="the operator If"):
        lower(model([both], 1), 17)


def test_a_graph_that_is_old_enough_and_other_domains_stay() -> None:
    other = helper.make_node("Odd", ["x"], ["y0"], domain="com.example")
    whole = model([other], 1)
    assert lower(whole, 18) is whole
    assert list(lower(whole, 13).graph.node) == [other]


def test_the_parts_of_a_decomposed_norm_are_marked() -> None:
    """They are computed in float32 in an fp16 graph: the squares of large activations exceed its range."""
    lowered = lower(model([REWRITTEN["layer norm"]], 1), 13)
    marked = [each.op_type for each in lowered.graph.node if any(NORM in name for name in each.output)]
    assert marked == ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
