"""The bundle: a folder with the graphs, a manifest and a model card, which a device can use without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.bundles.card import model_card
from comkd_cli.bundles.confidence import FittedConfidence
from comkd_cli.bundles.folding import Folding
from comkd_cli.bundles.graphs import GraphForm
from comkd_cli.bundles.input_parity import InputGraph
from comkd_cli.bundles.latency import Measured
from comkd_cli.bundles.parity import Parity
from comkd_cli.bundles.parts import Parts
from comkd_cli.bundles.precisions import OPTIMIZATION, Quantisation
from comkd_cli.bundles.standalone import standalone_predictor
from comkd_cli.edge.manifest import BUNDLE_FORMAT
from comkd_cli.errors import ExportError
from comkd_cli.files import sha256_of_file, write_text
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.recipe.catalog import CATALOG

TEXT_ENCODER, MERGES, TEXT_VOCABULARY = "text_encoder.onnx", "bpe_merges.txt", "text_vocabulary.npy"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Text:
    """How a device turns a class name into tokens for the text encoder."""

    prompt: str
    """With `{}` for the name; the first of `templates`."""
    context_length: int
    difference_max: float
    """Largest |difference| of a class vector from PyTorch's, over the student's own classes."""
    templates: tuple[str, ...] = ()
    """All prompts of a new class, whose normalised features are averaged."""
    precisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The file of each precision, and its figures against fp32."""
    parameters: int = 0
    merges: str | None = None
    """The file of CLIP's merges; None if the tokenizer is another one."""
    vocabulary: str | None = None
    """The file of the tokens, if the vocabulary was pruned."""
    tokenizer: Mapping[str, Any] | None = None
    """The file of a tokenizer other than CLIP's, and the fields of edge.json_tokenizer.TokenizerRules."""
    distilled: Mapping[str, Any] | None = None
    """The figures of an encoder that was distilled from the teacher's."""

    @property
    def file(self) -> str:
        """The graph of the first precision."""
        return str(next(iter(self.precisions.values()))["file"])


@dataclass(frozen=True)
class Head:
    """What turns image features into logits."""

    class_vectors: np.ndarray
    """float32 (classes, dim), L2-normalised."""
    logit_scale: float

    @property
    def matrix(self) -> np.ndarray:
        """float32 (dim, classes): logits are features @ matrix."""
        return np.ascontiguousarray(np.float32(self.logit_scale) * self.class_vectors.T)


@dataclass(frozen=True)
class Contents:
    """What a bundle's manifest and model card are made of, besides the files in its folder."""

    record: StudentRecord
    head: Head
    candidates: bool
    """Whether the class vectors are an input of the graphs."""
    form: GraphForm
    folding: Folding | None
    """EduAttention's gate, if the student has EduAttention."""
    inputs: Mapping[str, Mapping[str, InputGraph]]
    """By precision and input: the graphs that prepare their images themselves."""
    parameters: int
    """Of the student, from the image to its features."""
    multiply_adds: int
    """For one image."""
    parts: Parts
    """The real images of the checks."""
    license: str
    parities: Mapping[str, Parity]
    """By precision; those in the bundle."""
    failed: Mapping[str, str]
    """By precision: why it is not in the bundle."""
    quantisation: Sequence[Quantisation]
    """The quantisation methods that were compared, the chosen one first."""
    confidence: FittedConfidence
    student_top1: tuple[float, int] | None
    """The student's top-1 in PyTorch on the labelled test images of all parts, in percent, and their number."""
    student_sha256: str
    """Of student.pt."""
    text: Text | None = None
    latency: Sequence[Measured] = ()


def graph_name(graph: str, precision: str) -> str:
    """The file of a graph, such as `image_encoder` or `classifier`, in a precision."""
    return f"{graph}.onnx" if precision == "fp32" else f"{graph}.{precision}.onnx"


def check_head(student_file: Path, names: Sequence[str], head: Head) -> None:
    """Refuse a student whose class names and vectors do not go together in a bundle. Raises ExportError."""
    if len(names) != len(head.class_vectors):
        raise ExportError(
            f"has {len(names)} class names but {len(head.class_vectors)} class vectors",
            path=student_file,
            remedy="train the student again",
        )
    # An extra or a missing line in classes.txt would shift all later names to other classes.
    lines = class_list(names).splitlines()
    if len(lines) != len(names) or not all(lines):
        raise ExportError(
            "has a class without a name",
            path=student_file,
            remedy="correct data.classes and train the student again",
        )
    if not (np.isfinite(head.class_vectors).all() and np.isfinite(head.logit_scale)):
        raise ExportError(
            "its class vectors or its logit scale are not finite", path=student_file, remedy="train the student again"
        )


def class_list(names: Sequence[str]) -> str:
    """The content of classes.txt: one line per name.

    Older versions stored names with line breaks, which would shift all later names to other classes.
    """
    return "".join(f"{' '.join(name.split())}\n" for name in names)


def changed_score(contents: Contents) -> str | None:
    """A sentence if the student's score on its test images has changed since it was trained; otherwise None.

    Scores are compared if as many test images were read as were scored: then both are of all test images.
    """
    if contents.record.classes_added:  # more possible answers than when it was scored
        return None
    scored, images = (contents.record.metrics.get(name) for name in ("test_top1_percent", "test_images"))
    if scored is None or contents.student_top1 is None or contents.student_top1[1] != images:
        return None
    top1, count = contents.student_top1
    # One image may change its class, because other batch sizes round differently.
    if abs(scored - top1) < 150 / count:
        return None
    return (
        f"The student's top-1 on its {count} test images was {scored:.2f} % when it was trained and is "
        f"{top1:.2f} % now: the test images or their labels have changed since."
    )


def complete_bundle(folder: Path, contents: Contents) -> dict[str, Any]:
    """Add all other files of a bundle to a folder with its graphs, and return the manifest."""
    record = contents.record
    np.save(folder / "class_vectors.npy", contents.head.class_vectors)
    write_text(folder / "classes.txt", class_list(record.class_names))
    write_text(folder / "predict.py", standalone_predictor())
    manifest = _manifest(contents)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    write_text(folder / "README.md", model_card(manifest, record, sizes))
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _manifest(contents: Contents) -> dict[str, Any]:
    """The manifest without its entries of files."""
    record = contents.record
    text = None
    if contents.text is not None:
        text = {"file": contents.text.file, **asdict(contents.text)}
    return {
        "format": BUNDLE_FORMAT,
        "made_by": f"comkd {version('comkd')}",
        "recipe": record.recipe_name,
        "data": record.source,
        "teacher": _model_name(record.recipe.teacher),
        "student": _model_name(record.recipe.student),
        "classes": len(record.class_names),
        "classes_added": list(record.classes_added),
        "student_sha256": contents.student_sha256,
        "template": record.template,
        "preprocessing": asdict(record.preprocessing),
        "logit_scale": contents.head.logit_scale,
        "calibration": dict(contents.confidence.calibration),
        "threshold": dict(contents.confidence.threshold),
        "feature_dim": contents.head.class_vectors.shape[1],
        "memory": "candidates" if contents.candidates else "training",
        "opset": contents.form.opset,
        "batch": contents.form.batch,
        "edu_attention": contents.folding and {"gate": contents.folding.gate, "folded": contents.folding.folded},
        "parameters": contents.parameters,
        "multiply_adds": contents.multiply_adds,
        "precisions": {precision: _precision(precision, contents) for precision in contents.parities},
        "failed": dict(contents.failed),
        "images": _images(contents.parts),
        "text": text,
        "latency": [asdict(measured) for measured in contents.latency],
        # As recorded in training, if it had held-out test images with labels; the gates' images do not count here.
        **{name: record.metrics.get(name) for name in ("test_top1_percent", "test_images", "test_unreadable")},
        "test_images_held_out": record.holdout is not None,
        "test_images_were_learned_from": learns_from_test_images(record),
        "test_top1_changed": changed_score(contents),
        "selection": record.recipe.selection,
        "license": contents.license,
    }


def _precision(precision: str, contents: Contents) -> dict[str, Any]:
    entry: dict[str, Any] = {graph: graph_name(graph, precision) for graph in ("image_encoder", "classifier")}
    parity = contents.parities[precision]
    entry |= {"optimization": OPTIMIZATION[precision], "parity": parity.document()}
    if parity.logits is not None:
        entry["confidence"] = contents.confidence.figures(parity.logits)
    if inputs := contents.inputs.get(precision):
        entry["inputs"] = {kind: graph.document() for kind, graph in inputs.items()}
    if precision == "int8":
        entry["quantisation"] = [asdict(method) for method in contents.quantisation]
    return entry


def _images(parts: Parts) -> dict[str, Any]:
    """The number of images in each part, and their origin."""
    sizes = {name: asdict(getattr(parts, name).size) for name in ("gate", "choose", "calibrate")}
    fit = None if parts.fit is None else asdict(parts.fit.size)
    return sizes | {"fit": fit, "unreadable": parts.unreadable}


def learns_from_test_images(record: StudentRecord) -> bool:
    """Whether the student was trained on its test images, without their labels, as on ImageNet's variants."""
    dataset = CATALOG.get(record.recipe.data.dataset or "")
    return dataset is not None and dataset.layout == "imagenet-variant"


def _model_name(model: Any) -> str:
    parts = (model.arch or (model.config or {}).get("vision_cfg", {}).get("timm_model_name"), model.weights)
    return ":".join(part for part in parts if part) or "inline model"
