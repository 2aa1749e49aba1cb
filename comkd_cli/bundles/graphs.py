"""ONNX graphs of a student and of its teacher's text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from comkd_cli.bundles.lowering import EXPORTER_OPSET, lower
from comkd_cli.bundles.shapes import axis_length
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import ExportError, first_line
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import encode_classes
from comkd_cli.runtime.quiet import quiet

OPSET = 20  # the first with Gelu as one operator, with which vision transformers are faster
MOST_BYTES = 2**31 - 2**20  # a protobuf holds 2 GiB, including the graph itself
# The exporter treats an axis of length one as a constant.
EXAMPLE_BATCH = 2
IMAGE, FEATURES, CLASS_VECTORS, LOGITS = "image", "image_features", "class_vectors", "logits"
TOKENS, TEXT_FEATURES = "tokens", "text_features"

Example = tuple[Tensor, str | None]
"""An input of a graph: an example, and the name of its first axis if its length is dynamic."""


@dataclass(frozen=True)
class GraphForm:
    """What a runtime requires of every graph."""

    opset: int = OPSET
    """Version of the standard ONNX operators."""
    batch: int | None = None
    """A fixed length of batches, with which no axis is dynamic; None: any length."""


class ImageEncoder(nn.Module):
    """From prepared images to L2-normalised image features."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        """image: (batch, 3, size, size). Returns (batch, dim)."""
        features: Tensor = self.student(image).features
        return features


class CandidatesEncoder(ImageEncoder):
    """The same for EduAttention over the classes at hand: the class vectors are also an input."""

    def forward(self, image: Tensor, class_vectors: Tensor) -> Tensor:  # type: ignore[override]
        """image: (batch, 3, size, size); class_vectors: (classes, dim). Returns (batch, dim)."""
        features: Tensor = self.student(image, class_vectors).features
        return features


class TextEncoder(nn.Module):
    """From token ids to L2-normalised text features: the class vectors of the prompts.

    clip: an open_clip model, whose text encoder may be prompted.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 (texts, context). Returns (texts, dim)."""
        return encode_classes(self.clip, tokens)


def export_image_encoder(
    student: Student, preprocessing: Preprocessing, path: Path, form: GraphForm | None = None
) -> None:
    """Write the graph from `image` (batch, 3, size, size) float32 to `image_features` (batch, dim), for any batch size.

    With `memory: candidates` it has a second input, `class_vectors` (classes, dim), for any number of classes; with a
    fixed batch, for the student's. Raises ExportError if torch's exporter fails on the student, and if the opset lacks
    one of its operators.
    """
    form = form or GraphForm()
    size, batch = preprocessing.size, form.batch
    length = batch or EXAMPLE_BATCH
    inputs: dict[str, Example] = {IMAGE: (torch.zeros(length, 3, size, size), None if batch else "batch")}
    if student.uses_candidates:
        # Not the length of the batch, or the exporter would treat the two axes as one.
        examples = torch.zeros(EXAMPLE_BATCH + 1, student.class_vectors.shape[1])
        inputs[CLASS_VECTORS] = (student.class_vectors, None) if batch else (examples, "classes")
        _export(CandidatesEncoder(student), inputs, FEATURES, path, form.opset)
    else:
        _export(ImageEncoder(student), inputs, FEATURES, path, form.opset)


def export_text_encoder(encoder: nn.Module, context_length: int, path: Path, form: GraphForm | None = None) -> None:
    """Write the graph from `tokens` int64 (texts, context) to `text_features` (texts, dim), for any number of texts.

    encoder: a TextEncoder, or another module with its input and output. A fixed batch is a number of texts. Raises
    ExportError.
    """
    form = form or GraphForm()
    tokens = torch.zeros(form.batch or EXAMPLE_BATCH, context_length, dtype=torch.int64)
    inputs: dict[str, Example] = {TOKENS: (tokens, None if form.batch else "texts")}
    _export(encoder, inputs, TEXT_FEATURES, path, form.opset)


def add_classifier(encoder: Path, path: Path, class_vectors: np.ndarray, logit_scale: float) -> None:
    """Write the encoder's graph with logits = scale * features @ class_vectors' at its end.

    If the class vectors are an input of the encoder, they remain one. class_vectors: float32 (classes, dim).
    """
    model = onnx.load(encoder)
    graph = model.graph
    batch = axis_length(graph.output[0])
    classes: int | str = len(class_vectors)
    if given := next((entry for entry in graph.input if entry.name == CLASS_VECTORS), None):
        classes = axis_length(given)
        graph.initializer.append(numpy_helper.from_array(np.float32(logit_scale), "logit_scale"))
        graph.node.append(helper.make_node("Transpose", [CLASS_VECTORS], ["class_columns"], perm=[1, 0]))
        graph.node.append(helper.make_node("MatMul", [FEATURES, "class_columns"], ["similarities"]))
        graph.node.append(helper.make_node("Mul", ["similarities", "logit_scale"], [LOGITS]))
    else:
        columns = np.ascontiguousarray(np.float32(logit_scale) * class_vectors.T)
        graph.initializer.append(numpy_helper.from_array(columns, "scaled_class_columns"))
        graph.node.append(helper.make_node("MatMul", [FEATURES, "scaled_class_columns"], [LOGITS]))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [batch, classes]))
    save_graph(model, path)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph as one file, without the metadata of the tools that made it, such as paths of their machine.

    Operators older than OPSET get the oldest file format that has them, for runtimes of their time.
    """
    if any(entry.domain in ("", "ai.onnx") and entry.version < OPSET for entry in model.opset_import):
        model.ir_version = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    del graph.metadata_props[:]
    del graph.value_info[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        node.name = ""
    for entry in (*graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""
    onnx.save(model, path)


def check_graph(path: Path, standard_only: bool) -> None:
    """Check a graph with onnx, including shapes. standard_only: refuse operators outside the standard.

    Raises ExportError.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # onnx raises types of its own, in C++ and in Python
        raise ExportError(f"is not a valid ONNX graph: {first_line(error)}", path=path.name) from error
    domains = {node.domain for node in onnx.load(path, load_external_data=False).graph.node}
    if standard_only and (other := domains - {"", "ai.onnx"}):
        raise ExportError("has operators outside the ONNX standard", path=path.name, found=", ".join(sorted(other)))


def opset_of(path: Path) -> int:
    """The version of the standard ONNX operators that a graph uses."""
    model = onnx.load(path, load_external_data=False)
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


def _export(module: nn.Module, inputs: Mapping[str, Example], output: str, path: Path, opset: int) -> None:
    exporter_opset = max(opset, EXPORTER_OPSET)
    dynamic = {name: {0: axis} for name, (_, axis) in inputs.items() if axis is not None}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    if weights > MOST_BYTES:
        problem = "its weights do not fit into one ONNX file of 2 GiB"
        raise ExportError(problem, path=path.name, found=f"{weights / 2**30:.1f} GiB")
    try:
        with quiet():
            torch.onnx.export(
                module.eval(),
                tuple(example for example, _ in inputs.values()),
                path,
                input_names=list(inputs),
                output_names=[output],
                opset_version=exporter_opset,
                dynamic_shapes=dynamic or None,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many types
        reraise_system_error(error)
        problem = f"torch could not export this model to ONNX: {first_line(error)}"
        raise ExportError(problem, path=path.name, field=f"opset {opset}") from error
    if (written := opset_of(path)) != exporter_opset:
        problem = "not supported by torch's exporter for this model"
        raise ExportError(
            problem, field="--opset", found=opset, remedy=f"export with --opset {OPSET if opset > OPSET else written}"
        )
    save_graph(lower(onnx.load(path), opset), path)


def reraise_system_error(error: Exception) -> None:
    """Raise an error of the operating system again, such as a full disk: it is not a failure of a graph."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
