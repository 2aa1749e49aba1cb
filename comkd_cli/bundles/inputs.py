"""Graphs that prepare their images themselves: from the model's square pixels, or from an image of any size.

Nodes before a checked graph compute what edge/images.py computes with Pillow and numpy; the graph itself stays as it
is, so that each precision is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from comkd_cli.bundles.graphs import IMAGE, OPSET, check_graph, opset_of, save_graph
from comkd_cli.bundles.lowering import NEWEST_OPSET, OLDEST_OPSET
from comkd_cli.bundles.metadata import metadata_of, write_metadata
from comkd_cli.bundles.shapes import axis_length
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import ExportError

PIXELS = "pixels"
"""The name of the input of both kinds."""
PREFIX = "input."
"""Of the names of all values between the pixels and the graph's own input."""
RESIZE_OPSET = 18
"""The first opset whose Resize has an antialiasing filter."""
# Pillow's filters. Pillow's cubic has a = -0.5 and weighs only pixels within the image.
FILTERS: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
    "bilinear": {"mode": "linear", "exclude_outside": 1},
}
ROW, COLUMN = 2, 3
"""The axes of (batch, 3, height, width) along which pixels are resized and cropped."""


def check_inputs(kinds: Sequence[str], opset: int, batch: int | None, web: bool) -> None:
    """Refuse inputs and shapes that do not go together, unknown opsets, and an input whose operators an opset lacks.

    web: whether the bundle has a page, which classifies one image at a time. Raises ExportError.
    """
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(
            "comkd cannot write this opset",
            field="--opset",
            found=opset,
            allowed=f"{OLDEST_OPSET} to {NEWEST_OPSET}",
            remedy=f"export with --opset {OPSET}",
        )
    if web and batch not in (None, 1):
        raise ExportError("the page of --web classifies one image at a time", field="--batch", found=batch, allowed="1")
    if "image" in kinds and batch is not None:
        raise ExportError(
            "cannot be combined with --batch, which fixes every shape",
            field="--input",
            found="image",
            remedy="export with --input pixels, or without --batch",
        )
    if "image" in kinds and opset < RESIZE_OPSET:
        raise ExportError(
            "resizing in the graph needs Resize with antialias",
            field="--opset",
            found=opset,
            allowed=f"{RESIZE_OPSET} and later",
            remedy="export with --input pixels, or with a later --opset",
        )


def input_file(graph: Path, kind: str) -> Path:
    """The file of a graph with an input of a kind: `classifier.pixels.int8.onnx` beside `classifier.int8.onnx`."""
    return graph.with_name(graph.name.replace(".", f".{kind}.", 1))


def shape_of(kind: str, preprocessing: Preprocessing, batch: int | str) -> list[int | str]:
    """The shape of `pixels`, with the names of dynamic axes. batch: its length, or its name if it is dynamic."""
    sides = [preprocessing.size] * 2 if kind == "pixels" else ["height", "width"]
    return [batch, *sides, 3]


def add_input(kind: str, graph: Path, target: Path, preprocessing: Preprocessing) -> None:
    """Write a graph with `pixels` uint8 (batch, height, width, 3), RGB, as its first input instead of `image`.

    kind: `pixels` for the preprocessing's own height and width, or `image` for any. Other inputs and the outputs stay.
    Raises ExportError if the result is not a valid graph.
    """
    model = onnx.load(graph)
    front = _Front(kind, preprocessing)
    inputs = [entry for entry in model.graph.input if entry.name != IMAGE]
    (image,) = (entry for entry in model.graph.input if entry.name == IMAGE)
    nodes = [*front.nodes, *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend([front.entry(axis_length(image)), *inputs])
    model.graph.initializer.extend(front.constants)
    fields = metadata_of(model)
    save_graph(model, target)
    write_metadata(target, {**fields, "input": kind})
    check_graph(target, standard_only=False)  # the graph's own operators have been checked


def write_front(kind: str, graph: Path, target: Path, preprocessing: Preprocessing) -> None:
    """Write only what `add_input` puts before a graph: from `pixels` to `image`, as float32 (batch, 3, size, size)."""
    model = onnx.load(graph, load_external_data=False)
    (image,) = (entry for entry in model.graph.input if entry.name == IMAGE)
    front = _Front(kind, preprocessing)
    alone = helper.make_graph(front.nodes, kind, [front.entry(axis_length(image))], [image], front.constants)
    opset = helper.make_opsetid("", opset_of(graph))
    save_graph(helper.make_model(alone, opset_imports=[opset], ir_version=model.ir_version), target)
    check_graph(target, standard_only=True)


class _Front:
    """The nodes and constants from `pixels` to `image`."""

    def __init__(self, kind: str, preprocessing: Preprocessing) -> None:
        self._kind, self._preprocessing = kind, preprocessing
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        floats = self._add("Cast", [PIXELS], "float", to=TensorProto.FLOAT)
        planes = self._add("Transpose", [floats], "planes", perm=[0, 3, 1, 2])
        self._normalise(planes if kind == "pixels" else self._resize(planes))

    def entry(self, batch: int | str) -> ValueInfoProto:
        """The graph's input. batch: its length, or its name if it is dynamic."""
        return helper.make_tensor_value_info(
            PIXELS, TensorProto.UINT8, shape_of(self._kind, self._preprocessing, batch)
        )

    def _normalise(self, levels: str) -> None:
        """As edge/images.normalise does it, operation by operation: rounded to the same float32."""
        self._constant("255", np.float32(255))
        for name in ("mean", "std"):
            channels = np.asarray(getattr(self._preprocessing, name), np.float32)
            self._constant(name, channels.reshape(1, 3, 1, 1))
        scaled = self._add("Div", [levels, f"{PREFIX}255"], "scaled")
        centred = self._add("Sub", [scaled, f"{PREFIX}mean"], "centred")
        self.nodes.append(helper.make_node("Div", [centred, f"{PREFIX}std"], [IMAGE]))

    def _resize(self, planes: str) -> str:
        """As Pillow does it: along one axis, rounded to whole levels, then along the other, rounded again.

        Rows come first, unless an image shrinks much more in height: then the first of three passes has done the work
        of the last, and otherwise it changes nothing. What the centre crop discards is cut off after each of the other
        passes, which changes no pixel that it keeps.
        """
        for name, value in (("zero", 0.0), ("half", 0.5), ("most", 255.0)):
            self._constant(name, np.float32(value))
        height, width, first = self._resized_sizes()
        tall = self._pass(planes, first, ROW, "first")
        rows = self._pass(tall, width, COLUMN, "row", crop=True)
        square = self._pass(rows, height, ROW, "column", crop=True)
        size = self._preprocessing.size
        # The size of a crop is computed, so shape inference does not know it.
        shape = self._constant("shape", np.array([0, 3, size, size], np.int64))
        return self._add("Reshape", [square, shape], "square")

    def _resized_sizes(self) -> tuple[str, str, str]:
        """The height and width of the resized image, and the height after the first pass, each int64 (1,).

        Since version 13, Pillow resizes columns first if the height shrinks by more than twice the pixels that the
        width does (https://github.com/python-pillow/Pillow/pull/9549).
        """
        size = self._constant("size", np.array([self._preprocessing.size], np.int64))
        height = self._add("Shape", [PIXELS], "height", start=1, end=2)
        width = self._add("Shape", [PIXELS], "width", start=2, end=3)
        sides = [height, width]
        if self._preprocessing.resize_mode == "squash":
            resized = [size, size]
        else:
            short = self._add("Min", sides, "short")
            products = [self._add("Mul", [side, size], f"product.{i}") for i, side in enumerate(sides)]
            resized = [self._add("Div", [product, short], f"resized.{i}") for i, product in enumerate(products)]
        less_high, less_wide = (self._add("Sub", [sides[i], resized[i]], f"shrunk.{i}") for i in range(2))
        twice = self._add("Add", [less_wide, less_wide], "shrunk.twice")
        limit = self._add("Max", [twice, self._constant("none", np.array([0], np.int64))], "shrunk.limit")
        is_tall = self._add("Greater", [less_high, limit], "tall")
        return resized[0], resized[1], self._add("Where", [is_tall, resized[0], height], "first.height")

    def _pass(self, planes: str, length: str, axis: int, name: str, crop: bool = False) -> str:
        """Resize along one axis to `length` pixels, crop its centre, and round to whole levels from 0 to 255."""
        settings = {"antialias": 1, "coordinate_transformation_mode": "half_pixel", "axes": [axis]}
        settings |= FILTERS[self._preprocessing.interpolation]
        levels = self._add("Resize", [planes, "", "", length], f"{name}.resized", **settings)
        if crop and self._preprocessing.resize_mode == "shortest":
            levels = self._crop(levels, length, axis, name)
        # Pillow rounds halves up; Round rounds them to even.
        raised = self._add("Add", [levels, f"{PREFIX}half"], f"{name}.raised")
        whole = self._add("Floor", [raised], f"{name}.whole")
        return self._add("Clip", [whole, f"{PREFIX}zero", f"{PREFIX}most"], f"{name}.levels")

    def _crop(self, levels: str, length: str, axis: int, name: str) -> str:
        """The centre `size` pixels along an axis, from round((length - size) / 2) on, halves to even."""
        size = f"{PREFIX}size"
        excess = self._add("Sub", [length, size], f"{name}.excess")
        floats = self._add("Cast", [excess], f"{name}.float", to=TensorProto.FLOAT)
        halved = self._add("Mul", [floats, f"{PREFIX}half"], f"{name}.halved")
        rounded = self._add("Round", [halved], f"{name}.rounded")
        start = self._add("Cast", [rounded], f"{name}.start", to=TensorProto.INT64)
        end = self._add("Add", [start, size], f"{name}.end")
        axes = self._constant(f"{name}.axis", np.array([axis], np.int64))
        return self._add("Slice", [levels, start, end, axes], f"{name}.cropped")

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), PREFIX + name))
        return PREFIX + name

    def _add(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        self.nodes.append(helper.make_node(op_type, list(inputs), [PREFIX + name], **attributes))
        return PREFIX + name
