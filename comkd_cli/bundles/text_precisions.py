"""A text encoder in fewer bits, and how far its class vectors are from those of its fp32 graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from comkd_cli.bundles.gates import Gate
from comkd_cli.bundles.graphs import reraise_system_error, save_graph
from comkd_cli.bundles.precisions import compact_graph, prepare_graph, quantise_dynamic, to_fp16
from comkd_cli.bundles.runner import run_graph
from comkd_cli.errors import ExportError, first_line
from comkd_cli.evaluation.text_encoders import cosine_rows, least_agreement_percent
from comkd_cli.runtime.quiet import quiet

REDUCED = ("fp16", "int8")
TEXTS_AT_ONCE = 64
# The names that decide between the methods of int8 are not those of the gate.
CHOOSE_NAMES = (
    *("sea otter", "wheelbarrow", "maple leaf", "steam engine", "birthday cake", "glacier", "violin", "running"),
    *("tabby cat", "oak tree", "coffee mug", "railway station", "striped", "1970s car", "Boeing 737", "Ölbild"),
)
GATE_NAMES = (
    *("red fox", "golden retriever", "emperor penguin", "hammerhead shark", "monarch butterfly", "honey bee"),
    *("sunflower", "cactus", "fly agaric", "apple pie", "sushi", "espresso", "bicycle", "fire engine", "sailboat"),
    *("airliner", "tractor", "suspension bridge", "lighthouse", "castle", "supermarket", "bedroom", "volcano"),
    *("desert", "rainbow", "traffic light", "screwdriver", "keyboard", "umbrella", "wrist watch", "wedding dress"),
    *("playing the piano", "riding a horse", "rock climbing", "woven", "polka dotted", "rusty metal", "X-ray"),
    *("a handwritten seven", "zip code 90210", "person", "crowd", "nothing", "Größe", "富士山", "кошка", "🦊"),
)


@dataclass(frozen=True)
class TextFigures:
    """Class vectors of a graph against those of the fp32 graph."""

    cosine_min: float
    """Of the worst name."""
    cosine_mean: float
    agreement_percent: float
    """Images with the same top-1 class, when all classes of the run have the graph's vectors, or every second one."""
    names: int
    """That were compared: the classes of the run, and others."""
    images: int

    def failures(self, gate: Gate) -> list[str]:
        """What misses the gate, with its figure; empty if it passes."""
        missed = []
        if not self.cosine_min >= gate.cosine_min:  # also if it is NaN
            missed.append(f"smallest cosine {self.cosine_min:.5f} of {self.names} names (limit {gate.cosine_min})")
        if not self.agreement_percent >= gate.agreement_min_percent:
            missed.append(
                f"top-1 agreement {self.agreement_percent:.2f} % on {self.images} images (limit "
                f"{gate.agreement_min_percent} %)"
            )
        return missed


@dataclass(frozen=True)
class TextComparison:
    """What the graphs of a text encoder are compared on."""

    tokens: np.ndarray
    """int64 (names, context): of the first prompt of each class of the run, then of other names."""
    exact: np.ndarray
    """float32 (names, dim): the vectors by the fp32 graph."""
    classes: int
    """Of the run."""
    features: np.ndarray
    """float32 (images, dim): the student's features of the gate's images."""

    def figures(self, found: np.ndarray) -> TextFigures:
        """found: the vectors of the names by another graph, (names, dim)."""
        cosines = cosine_rows(found, self.exact)
        return TextFigures(
            cosine_min=float(cosines.min()),
            cosine_mean=float(cosines.mean()),
            agreement_percent=least_agreement_percent(self.features, self.exact[: self.classes], found[: self.classes]),
            names=len(self.tokens),
            images=len(self.features),
        )


def text_vectors(graph: Path, tokens: np.ndarray, optimization: str) -> np.ndarray:
    """The output of a text encoder's graph, (texts, dim). Raises ExportError."""
    starts = range(0, len(tokens), TEXTS_AT_ONCE)
    outputs = run_graph(graph, {str(i): tokens[i : i + TEXTS_AT_ONCE] for i in starts}, None, optimization)
    return np.concatenate([outputs[str(i)] for i in starts])


def write_text_graph(precision: str, source: Path, target: Path, choose: np.ndarray) -> str | None:
    """Write the graph of a text encoder in one of REDUCED; returns the method of int8. Raises ExportError.

    choose: int64 (texts, context), tokens that decide between the methods of int8.
    """
    if precision == "fp16":
        to_fp16(source, target)
        return None
    return _to_int8(source, target, choose)


def _to_int8(source: Path, target: Path, choose: np.ndarray) -> str:
    """Dynamic quantisation with signed or unsigned weights, whichever is closer, and a scale for each token's vector.

    On CPUs without VNNI signed weights have seven bits and unsigned ones eight; see precisions.quantise_dynamic.
    """
    prepared = target.with_suffix(".prepared")
    expected = text_vectors(source, choose, "all")
    cosines: dict[str, float] = {}
    problems = []
    try:
        try:
            prepare_graph(source, prepared)
        except Exception as error:  # of onnxruntime's shape inference and optimiser, of many types
            reraise_system_error(error)
            problem = f"onnxruntime could not prepare the graph for int8: {first_line(error)}"
            raise ExportError(problem, path=source.name) from error
        for signed in (True, False):
            method = "dynamic-signed" if signed else "dynamic-unsigned"
            graph = target.with_suffix(f".{method}")
            try:
                with quiet():
                    quantise_dynamic(prepared, graph, signed)
                save_graph(compact_graph(quantise_tables(onnx.load(graph))), graph)
                cosines[method] = float(cosine_rows(text_vectors(graph, choose, "all"), expected).min())
            except Exception as error:  # of onnxruntime's quantiser, of many types
                reraise_system_error(error)
                problems.append(f"{method}: {first_line(error)}")
        if not cosines:
            raise ExportError(f"onnxruntime could not quantise the graph: {'; '.join(problems)}", path=source.name)
        best = max(cosines, key=lambda method: cosines[method])
        target.with_suffix(f".{best}").replace(target)
        return best
    finally:
        for left in target.parent.glob(f"{target.stem}.*"):
            if left.suffix in (".prepared", ".dynamic-signed", ".dynamic-unsigned"):
                left.unlink()


def quantise_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with 8-bit tables of vectors: each row, such as a token's vector, has a scale of its own.

    onnxruntime's quantiser has one scale for the whole table, with which rows of small values keep few levels. Tables
    that are used otherwise than by Gather on their first axis stay as they are.
    """
    graph, nodes = model.graph, list(model.graph.node)
    tables = {
        entry.name: numpy_helper.to_array(entry)
        for entry in graph.initializer
        if entry.data_type == TensorProto.FLOAT and len(entry.dims) == 2 and _is_table(entry.name, nodes)
    }
    others = [entry for entry in graph.initializer if entry.name not in tables]
    del graph.node[:]
    del graph.initializer[:]
    graph.initializer.extend(others)
    for name, values in tables.items():
        scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
        scales[scales == 0] = 1
        levels = np.rint(values / scales).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(levels, f"{name}.levels"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scales"))
    for node in nodes:
        if node.op_type != "Gather" or node.input[0] not in tables:
            graph.node.append(node)
            continue
        (name, rows), out = node.input, node.output[0]
        graph.node.extend(
            [
                helper.make_node("Gather", [f"{name}.levels", rows], [f"{out}.levels"], axis=0),
                helper.make_node("Cast", [f"{out}.levels"], [f"{out}.float"], to=TensorProto.FLOAT),
                helper.make_node("Gather", [f"{name}.scales", rows], [f"{out}.scales"], axis=0),
                helper.make_node("Mul", [f"{out}.float", f"{out}.scales"], [out]),
            ]
        )
    return model


def _is_table(name: str, nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether an initializer is used, and only as the table of a Gather on its first axis."""
    users = [node for node in nodes if name in node.input]
    return bool(users) and all(
        node.op_type == "Gather" and node.input[0] == name and _axis(node) == 0 for node in users
    )


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
