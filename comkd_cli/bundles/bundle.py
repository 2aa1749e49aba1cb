"""The bundle: a folder that a device can use without torch, and that says what it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.bundles.card import model_card
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

TEXT_ENCODER, MERGES = "text_encoder.onnx", "bpe_merges.txt"


@dataclass(frozen=True)
class Text:
    """How a device turns a class name into tokens for the text encoder."""

    prompt: str
    """`{}` stands for the name."""
    context_length: int
    difference_max: float
    """Of a text feature from PyTorch's, over the run's own class prompts."""


@dataclass
class Contents:
    """All that a bundle says, beside the files that are in its folder already."""

    record: StudentRecord
    class_vectors: np.ndarray
    """float32 (classes, dim), L2-normalised."""
    logit_scale: float
    candidates: bool
    """Whether the class vectors are an input of the graphs."""
    opset: int
    parameters: int
    """Of everything between an image and its feature."""
    multiply_adds: int
    """For one image."""
    parts: Parts
    """The real images of the checks."""
    license: str = "unknown"
    parities: dict[str, Parity] = field(default_factory=dict)
    """By precision; those of the bundle."""
    failed: dict[str, str] = field(default_factory=dict)
    """By precision: why it is not in the bundle."""
    quantisation: list[Quantisation] = field(default_factory=list)
    """The ways to int8 that were compared, the one that was taken first."""
    text: Text | None = None
    latency: list[Measured] = field(default_factory=list)

    @property
    def head(self) -> np.ndarray:
        """float32 (dim, classes): logits are features @ head."""
        return np.ascontiguousarray(np.float32(self.logit_scale) * self.class_vectors.T)


def graph_name(what: str, precision: str) -> str:
    """The file of `image_encoder` or `classifier` in a precision."""
    return f"{what}.onnx" if precision == "fp32" else f"{what}.{precision}.onnx"


def check_head(student_file: Path, names: Sequence[str], vectors: np.ndarray, logit_scale: float) -> None:
    """Refuse a student whose class names and vectors do not go together in a bundle. Raises ExportError."""
    if len(names) != len(vectors):
        raise ExportError(
            f"{student_file}: has {len(names)} class names and {len(vectors)} class vectors; train the student again"
        )
    # As a bundle's readers take the list apart: a line too many or too few would give every later class another's name.
    lines = class_list(names).splitlines()
    if len(lines) != len(names) or not all(lines):
        raise ExportError(
            f"{student_file}: has a class without a name; correct data.classes and train the student again"
        )
    if not (np.isfinite(vectors).all() and np.isfinite(logit_scale)):
        raise ExportError(
            f"{student_file}: its class vectors or its logit scale are not numbers (NaN or infinite); train it again"
        )


def class_list(names: Sequence[str]) -> str:
    """The content of classes.txt.

    A line each, whatever an older version stored: a line break in a name would move every name after it.
    """
    return "".join(f"{' '.join(name.split())}\n" for name in names)


def changed_score(contents: Contents) -> str | None:
    """A sentence where the test images are not those that the student's score is of; None where they may be.

    It is compared where the gate has as many test images as were scored: then both are the student's top-1 on all.
    """
    scored, images = (contents.record.metrics.get(name) for name in ("test_top1_percent", "test_images"))
    gate = contents.parts.gate.size
    parity = next(iter(contents.parities.values()), None)
    if scored is None or parity is None or parity.student_top1_percent is None or images != gate.images:
        return None
    # One image may go either way where another batch size rounds otherwise.
    if abs(scored - parity.student_top1_percent) < 150 / gate.images:
        return None
    return (
        f"The student's top-1 on its {gate.images} test images was {scored:.2f} % when it was trained and is "
        f"{parity.student_top1_percent:.2f} % now: the test images or their labels have changed since."
    )


def complete_bundle(folder: Path, contents: Contents) -> dict[str, Any]:
    """Add to a folder with the graphs all that makes it a bundle, and return its manifest."""
    record = contents.record
    np.save(folder / "class_vectors.npy", contents.class_vectors)
    write_text(folder / "classes.txt", class_list(record.class_names))
    write_text(folder / "predict.py", standalone_predictor())
    manifest: dict[str, Any] = {
        "format": BUNDLE_FORMAT,
        "made_by": f"comkd {version('comkd')}",
        "recipe": record.recipe_name,
        "data": record.source,
        "teacher": _model_name(record.recipe.teacher),
        "student": _model_name(record.recipe.student),
        "classes": len(record.class_names),
        "template": record.template,
        "preprocessing": asdict(record.preprocessing),
        "logit_scale": contents.logit_scale,
        "feature_dim": contents.class_vectors.shape[1],
        "memory": "candidates" if contents.candidates else "training",
        "opset": contents.opset,
        "parameters": contents.parameters,
        "multiply_adds": contents.multiply_adds,
        "precisions": {precision: _precision(precision, contents) for precision in contents.parities},
        "failed": contents.failed,
        "images": _images(contents.parts),
        "text": None,
        "latency": [asdict(measured) for measured in contents.latency],
        # Of the training, where it had held-out test images with labels; the gates' images never count here.
        **{name: record.metrics.get(name) for name in ("test_top1_percent", "test_images", "test_unreadable")},
        "test_images_were_learned_from": _learns_from_test_images(record),
        "test_top1_changed": changed_score(contents),
        "selection": record.recipe.selection,
        "license": contents.license,
    }
    if contents.text is not None:
        manifest["text"] = {"file": TEXT_ENCODER, "merges": MERGES, **asdict(contents.text)}
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    write_text(folder / "README.md", model_card(manifest, record, sizes))
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _precision(precision: str, contents: Contents) -> dict[str, Any]:
    entry: dict[str, Any] = {what: graph_name(what, precision) for what in ("image_encoder", "classifier")}
    entry |= {"optimization": OPTIMIZATION[precision], "parity": contents.parities[precision].document()}
    if precision == "int8":
        entry["quantisation"] = [asdict(way) for way in contents.quantisation]
    return entry


def _images(parts: Parts) -> dict[str, Any]:
    """How many images each part has, and where they are from."""
    sizes = {name: asdict(getattr(parts, name).size) for name in ("gate", "choose", "calibrate")}
    return sizes | {"unreadable": parts.unreadable}


def _learns_from_test_images(record: StudentRecord) -> bool:
    """Whether the student was distilled on its test images, without their labels, as on ImageNet's variants."""
    dataset = CATALOG.get(record.recipe.data.dataset or "")
    return dataset is not None and dataset.layout == "imagenet-variant"


def _model_name(model: Any) -> str:
    parts = (model.arch or (model.config or {}).get("vision_cfg", {}).get("timm_model_name"), model.weights)
    return ":".join(part for part in parts if part) or "inline model"
