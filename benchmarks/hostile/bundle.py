"""Hostile bundles: the manifest, its files with digests that fit, and graphs with their metadata."""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.hostile import mutations
from comkd_cli.bundles.metadata import write_metadata
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.images import Preprocessing
from comkd_cli.flows.inspect.exported import inspect_bundle, inspect_graph

SIZE, NAMES = 4, ("red fox", "hare", "owl")
PREPROCESSING = Preprocessing(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@cache
def _graph(output: str) -> bytes:
    """(batch, 3, SIZE, SIZE) -> (batch, 3): a linear classifier."""
    matrix = np.random.default_rng(0).normal(size=(3 * SIZE * SIZE, len(NAMES))).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "matrix"], [output])],
        "hostile",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", len(NAMES)])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


@cache
def _files() -> dict[str, bytes]:
    buffer = io.BytesIO()
    np.save(buffer, np.eye(3, dtype=np.float32))
    return {
        "classifier.onnx": _graph("logits"),
        "image_encoder.onnx": _graph("image_features"),
        "classes.txt": "".join(f"{name}\n" for name in NAMES).encode(),
        "class_vectors.npy": buffer.getvalue(),
    }


def _manifest() -> dict[str, Any]:
    return {
        "format": "comkd-bundle/1",
        "classes": len(NAMES),
        "preprocessing": asdict(PREPROCESSING),
        "logit_scale": 10.0,
        "calibration": {"temperature": 2.0},
        "threshold": {"score": "max_probability", "value": 0.5, "classes": {"hare": 0.25}},
        "memory": "training",
        "batch": None,
        "text": None,
        "precisions": {
            "fp32": {
                "image_encoder": "image_encoder.onnx",
                "classifier": "classifier.onnx",
                "optimization": "all",
            }
        },
    }


def bundle(rng: random.Random, folder: Path) -> None:
    """A bundle with a changed manifest or changed files, which classifies an image and is inspected."""
    files, manifest = dict(_files()), _manifest()
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(sorted(files))
        files[name] = _changed_file(rng, name, files[name])
    manifest["files"] = {name: {"sha256": hashlib.sha256(held).hexdigest()} for name, held in files.items()}
    if rng.random() < 0.6:
        manifest = mutations.changed(rng, manifest, times=3)
    for name, held in files.items():
        (folder / name).write_bytes(held)
    text = json.dumps(manifest).encode("utf-8", "surrogatepass")
    (folder / "manifest.json").write_bytes(mutations.damaged(rng, text) if rng.random() < 0.1 else text)
    (folder / "predict.py").write_text("open('CANARY', 'w')")
    classifier = Classifier(folder, threads=1, precision=rng.choice((None, None, "fp32", "int8")))
    found = classifier.predict(Image.new("RGB", (5, 9), "red"))
    assert found
    classifier.is_none_of_these(found)
    inspect_bundle(folder)


def _changed_file(rng: random.Random, name: str, content: bytes) -> bytes:
    if name == "classes.txt" and rng.random() < 0.8:
        return "\n".join(rng.choice((*NAMES, mutations.text(rng))) for _ in NAMES).encode("utf-8", "surrogatepass")
    if name == "class_vectors.npy" and rng.random() < 0.5:
        return _array(rng)
    if content == _files()[name] and name.endswith(".onnx") and rng.random() < 0.5:
        return _changed_graph(rng, content)
    return mutations.damaged(rng, content)


def _array(rng: random.Random) -> bytes:
    """An .npy file of objects, or with a header that states more than there is."""
    buffer = io.BytesIO()
    shape = rng.choice(((3, 3), (10**6, 10**6), (-1, 3), (3,), (0, 0)))
    header = {"descr": rng.choice(("<f4", "|O", "<c16", "|V1000000")), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)  # type: ignore[arg-type]
    return buffer.getvalue() + b"cos\nsystem\n(S'touch CANARY'\ntR." * 3


def _changed_graph(rng: random.Random, content: bytes) -> bytes:
    """A graph with other attributes, sizes, operators, or data outside of the file."""
    model = onnx.ModelProto.FromString(content)
    kind, tensor = rng.randrange(7), model.graph.initializer[0]
    if kind == 0:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", rng.choice(("../../../../etc/passwd", "/dev/zero", "classes.txt"))
    elif kind == 1:
        tensor.dims[0] = rng.choice((0, -1, 10**6, 2**62))
    elif kind == 2:
        node = rng.choice(model.graph.node)
        node.op_type, node.domain = rng.choice(("Loop", "If", "Nope", "Expand")), rng.choice(("", "ai.onnx.ml", "x"))
    elif kind == 3:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = rng.choice((0, 1, 2**40))
    elif kind == 4:
        model.opset_import[0].version = rng.choice((0, 1, 999))
    elif kind == 5:
        model.graph.node.extend(list(model.graph.node))
    else:
        model.graph.node[1].input[0] = model.graph.node[1].output[0]
    return bytes(model.SerializeToString())


def graph(rng: random.Random, folder: Path) -> None:
    """An ONNX file with metadata of unknown origin, which is inspected."""
    path = folder / "graph.onnx"
    path.write_bytes(_graph("logits"))
    write_metadata(path, {"format": "comkd-graph/1", "classes": list(NAMES), "preprocessing": asdict(PREPROCESSING)})
    model = onnx.load(path)
    for _ in range(rng.randrange(3)):
        entry = model.metadata_props.add()
        entry.key = rng.choice(("comkd.format", "comkd.classes", "comkd.x")) + rng.choice(("", "\x1b[31m"))
        text = rng.choice((mutations.text(rng), json.dumps(mutations.value(rng)), "[" * 5000))
        entry.value = text.encode("utf-8", "replace").decode()
    content = bytes(model.SerializeToString())
    path.write_bytes(mutations.damaged(rng, content) if rng.random() < 0.5 else content)
    inspect_graph(path)
