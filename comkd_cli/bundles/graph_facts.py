"""What an ONNX file is, as plain data. No torch; nothing in the file is executed, and no other file is opened."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from comkd_cli.bundles.metadata import metadata_of
from comkd_cli.errors import BundleError


def graph_facts(path: Path) -> dict[str, Any] | None:
    """Inputs, outputs, operators, weights, and what comkd wrote into the metadata; None for a file that is not a graph.

    Raises BundleError for metadata of comkd that are damaged.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # of protobuf and of onnx, which share no base
        return None
    graph = model.graph
    if not graph.node or not graph.output:
        return None
    try:
        metadata = metadata_of(model)
    except ValueError as error:
        raise BundleError("its comkd metadata are not valid JSON", path=path) from error
    weights = {entry.name for entry in graph.initializer}
    return {
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [_value(entry) for entry in graph.input if entry.name not in weights],
        "outputs": [_value(entry) for entry in graph.output],
        "nodes": len(graph.node),
        "weights": sum(prod(entry.dims) for entry in graph.initializer),
        "weight_types": sorted({_type(entry.data_type) for entry in graph.initializer}),
        "metadata": metadata,
    }


def _value(entry: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = entry.type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    return {"name": entry.name, "type": _type(tensor.elem_type), "shape": shape}


def _type(number: int) -> str:
    known = TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(number)).lower() if number in known else f"type {number}"
