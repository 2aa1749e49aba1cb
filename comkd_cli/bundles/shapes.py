"""Fixed and dynamic axes of a graph's inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import onnx


def axis_length(entry: onnx.ValueInfoProto) -> int | str:
    """The length of the first axis of an input or output, or its name if it is dynamic."""
    axis = entry.type.tensor_type.shape.dim[0]
    return str(axis.dim_param) or int(axis.dim_value)


def fixed_batch(path: Path) -> int | None:
    """The length of a graph's batches; None if it accepts any."""
    length = axis_length(onnx.load(path, load_external_data=False).graph.input[0])
    return length if isinstance(length, int) else None
