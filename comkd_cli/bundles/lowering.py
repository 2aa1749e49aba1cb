"""The same graph in an older version of the ONNX operators, for runtimes that do not know the newer ones.

torch's exporter writes EXPORTER_OPSET and later. onnx's own version_converter has no adapters from there down for
LayerNormalization, Split, Shape and reductions over axes, so operators are rewritten here, by their definitions in
ONNX's Operators.md and Changelog.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from comkd_cli.errors import ExportError

EXPORTER_OPSET = 18
OLDEST_OPSET = 13
NEWEST_OPSET = 25
"""The last that onnxscript's version converter knows, by which torch's exporter writes opsets after EXPORTER_OPSET."""
NORM = ".norm."
"""In the names of the values of a normalisation that was decomposed: its squares need float32."""

# Their later versions accept more types of tensors, and compute the same.
MORE_TYPES = {"Add", "Sub", "Mul", "Div", "CumSum", "Identity", "Relu", "Pow", "Where", "LeakyRelu", "PRelu"}
MORE_TYPES |= {"GreaterOrEqual", "LessOrEqual"}
ANY = object()
# A later version has an attribute that changes nothing at this value.
NEUTRAL: dict[str, dict[str, object]] = {
    "BatchNormalization": {"training_mode": 0},
    "Pad": {},
    "Reshape": {"allowzero": ANY},  # concerns tensors without elements, of which there are none
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "ScatterElements": {"reduction": b"none"},
    "ScatterND": {"reduction": b"none"},
}
REDUCTIONS = {
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
}


def lower(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The graph in `opset`, from OLDEST_OPSET on; the model itself if it is not newer than that.

    Names of inputs, outputs and weights stay. Raises ExportError, naming the operator, if one has no equivalent there.
    """
    entry = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if entry.version <= opset:
        return model
    lowered = _Lowering(model, entry.version, opset).run()
    entry.version = opset
    return lowered


class _Lowering:
    """Rewrites the nodes of a model one by one."""

    def __init__(self, model: onnx.ModelProto, written: int, opset: int) -> None:
        self._model, self._written, self._opset = model, written, opset
        self._constants = {each.name: each for each in model.graph.initializer}
        self._rewriters: dict[str, Callable[[NodeProto], list[NodeProto]]] = {
            "HardSwish": self._hard_swish,
            "LayerNormalization": self._layer_normalization,
            "Mish": self._mish,
            "Shape": self._shape,
            "Split": self._split,
        }

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """The number of axes of each value, as far as it can be inferred."""
        graph = onnx.shape_inference.infer_shapes(self._model).graph
        entries = (*graph.value_info, *graph.input, *graph.output)
        return {entry.name: len(entry.type.tensor_type.shape.dim) for entry in entries}

    def run(self) -> onnx.ModelProto:
        """The rewritten model."""
        graph = self._model.graph
        nodes = [lowered for node in graph.node for lowered in self._lowered(node)]
        del graph.node[:]
        graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input} | {entry.name for entry in graph.output}
        kept = [each for name, each in self._constants.items() if name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return self._model

    def _lowered(self, node: NodeProto) -> list[NodeProto]:
        if node.domain not in ("", "ai.onnx"):
            return [node]
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise self._refusal(node)  # its branches are graphs of their own
        name, versions = node.op_type, (self._version(node, self._opset), self._version(node, self._written))
        if versions[0] == versions[1] or (versions[0] is not None and name in MORE_TYPES):
            return [node]
        if name in NEUTRAL and versions[0] is not None:
            return [self._without_neutral(node)]
        if name in REDUCTIONS:
            return [self._reduction(node)]
        if name in self._rewriters:
            return self._rewriters[name](node)
        raise self._refusal(node)

    @staticmethod
    def _version(node: NodeProto, opset: int) -> int | None:
        """The version of an operator in an opset; None if the opset does not have it."""
        try:
            return int(onnx.defs.get_schema(node.op_type, opset, "").since_version)
        except onnx.defs.SchemaError:
            return None

    def _refusal(self, node: NodeProto) -> ExportError:
        least = onnx.defs.get_schema(node.op_type, self._written, "").since_version
        return ExportError(
            f"the operator {node.op_type} of this model has no equivalent in this opset",
            field="--opset",
            found=self._opset,
            remedy=f"export with --opset {least} or later",
        )

    def _without_neutral(self, node: NodeProto) -> NodeProto:
        """The node without the attributes that the older version lacks, if they change nothing."""
        schema, neutral = onnx.defs.get_schema(node.op_type, self._opset, ""), NEUTRAL[node.op_type]
        unknown = [each for each in node.attribute if each.name not in schema.attributes]
        for each in unknown:
            allowed = neutral.get(each.name)
            if allowed is not ANY and helper.get_attribute_value(each) != allowed:
                raise self._refusal(node)
        if len(node.input) > schema.max_input:
            raise self._refusal(node)
        kept = self._attributes(node, *(each.name for each in unknown))
        return self._node(node.op_type, node.input, node.output, **kept)

    def _reduction(self, node: NodeProto) -> NodeProto:
        """axes: an input since opset 18, an attribute before."""
        attributes = self._attributes(node, "noop_with_empty_axes")
        if len(node.input) < 2 or not node.input[1]:
            if len(attributes) < len(node.attribute) and self._attribute(node, "noop_with_empty_axes", 0):
                return self._node("Identity", node.input[:1], node.output)
            return self._node(node.op_type, node.input[:1], node.output, **attributes)
        axes = self._constant(node, node.input[1]).tolist()
        return self._node(node.op_type, node.input[:1], node.output, axes=axes, **attributes)

    def _split(self, node: NodeProto) -> list[NodeProto]:
        """num_outputs, since opset 18, is the number of outputs."""
        return [self._node("Split", node.input, node.output, **self._attributes(node, "num_outputs"))]

    def _shape(self, node: NodeProto) -> list[NodeProto]:
        """start and end, since opset 15, are a Slice of the whole shape."""
        if not node.attribute:
            return [node]
        start, end = self._attribute(node, "start", 0), self._attribute(node, "end", np.iinfo(np.int64).max)
        (result,) = node.output
        whole = f"{result}.shape"
        bounds = [
            self._new(f"{result}.{name}", np.array([value], np.int64))
            for name, value in (("start", start), ("end", end))
        ]
        return [self._node("Shape", node.input, [whole]), self._node("Slice", [whole, *bounds], [result])]

    def _layer_normalization(self, node: NodeProto) -> list[NodeProto]:
        """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias, over the axes from `axis` on."""
        source, scale, *bias = node.input
        if len([name for name in node.output if name]) > 1:
            raise self._refusal(node)
        axis = self._attribute(node, "axis", -1)
        if axis >= 0:
            if source not in self._ranks:
                raise self._refusal(node)
            axis -= self._ranks[source]
        result, axes = node.output[0], list(range(axis, 0))
        epsilon = self._new(f"{result}{NORM}epsilon", np.float32(self._attribute(node, "epsilon", 1e-5)))
        name = {part: f"{result}{NORM}{part}" for part in ("mean", "less", "square", "variance", "sum", "root", "unit")}
        scaled = f"{result}{NORM}scaled" if bias else result
        nodes = [
            self._node("ReduceMean", [source], [name["mean"]], axes=axes, keepdims=1),
            self._node("Sub", [source, name["mean"]], [name["less"]]),
            self._node("Mul", [name["less"], name["less"]], [name["square"]]),
            self._node("ReduceMean", [name["square"]], [name["variance"]], axes=axes, keepdims=1),
            self._node("Add", [name["variance"], epsilon], [name["sum"]]),
            self._node("Sqrt", [name["sum"]], [name["root"]]),
            self._node("Div", [name["less"], name["root"]], [name["unit"]]),
            self._node("Mul", [name["unit"], scale], [scaled]),
        ]
        return [*nodes, self._node("Add", [scaled, *bias], [result])] if bias else nodes

    def _hard_swish(self, node: NodeProto) -> list[NodeProto]:
        """x * max(0, min(1, x / 6 + 1 / 2))."""
        (source,), (result,) = node.input, node.output
        return [
            self._node("HardSigmoid", [source], [f"{result}.gate"], alpha=1 / 6, beta=0.5),
            self._node("Mul", [source, f"{result}.gate"], [result]),
        ]

    def _mish(self, node: NodeProto) -> list[NodeProto]:
        """x * tanh(log(1 + exp(x)))."""
        (source,), (result,) = node.input, node.output
        return [
            self._node("Softplus", [source], [f"{result}.softplus"]),
            self._node("Tanh", [f"{result}.softplus"], [f"{result}.tanh"]),
            self._node("Mul", [source, f"{result}.tanh"], [result]),
        ]

    def _new(self, name: str, value: np.ndarray | np.generic) -> str:
        """Add a constant."""
        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _constant(self, node: NodeProto, name: str) -> np.ndarray:
        tensor: TensorProto | None = self._constants.get(name)
        if tensor is None:
            raise self._refusal(node)
        return np.asarray(numpy_helper.to_array(tensor))

    @staticmethod
    def _attribute(node: NodeProto, name: str, default: Any) -> Any:
        return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)

    @staticmethod
    def _attributes(node: NodeProto, *without: str) -> dict[str, Any]:
        return {each.name: helper.get_attribute_value(each) for each in node.attribute if each.name not in without}

    @staticmethod
    def _node(op_type: str, inputs: Iterable[str], outputs: Iterable[str], **attributes: Any) -> NodeProto:
        return helper.make_node(op_type, list(inputs), list(outputs), **attributes)
