"""Parity: whether exported graphs answer as the student does, on real images and at several batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.bundles.runner import run_graph
from comkd_cli.errors import ExportError
from comkd_cli.evaluation.metrics import agreement_percent, top1_percent, wilson_interval_percent

BATCH_SIZES = (1, 2, 7)
BATCH_IMAGES = 64
"""Images that are sent through at every batch size; the others once."""
WHOLE_BATCH = 64
NO_ANSWER = -1
LOGIT_TOLERANCE = 0.01
"""Of a logit, as a share of the logit scale: the two graphs run the same encoder, but need not round alike."""


@dataclass(frozen=True)
class Gate:
    """What a precision must keep to be in a bundle."""

    cosine_min: float
    """Of the worst image's features with the student's."""
    agreement_min_percent: float
    """Answers that are the student's."""
    top1_loss_max_points: float
    """Top-1 of the student less that of the graph, where the images have labels."""
    difference_max: float = float("inf")
    """Of a single feature."""


GATES = {
    "fp32": Gate(cosine_min=0.99999, agreement_min_percent=100.0, top1_loss_max_points=0.1, difference_max=1e-4),
    "fp16": Gate(cosine_min=0.9995, agreement_min_percent=99.5, top1_loss_max_points=0.2),
    "int8": Gate(cosine_min=0.98, agreement_min_percent=98.0, top1_loss_max_points=1.0),
}


@dataclass(frozen=True)
class Reference:
    """What the student says in PyTorch of prepared images."""

    images: np.ndarray
    """float32 (images, 3, size, size)."""
    features: np.ndarray
    """float32 (images, dim), L2-normalised."""
    logits: np.ndarray
    """float32 (images, classes)."""
    labels: np.ndarray | None
    """int64 (images,), or None where the images have none."""
    different: int | None = None
    """How many of the images differ from all others; None: all."""
    head: np.ndarray | None = None
    """float32 (dim, classes): logits are features @ head; None: that is not checked."""


@dataclass(frozen=True)
class Parity:
    """How far the graphs' answers are from PyTorch's: the worst of each figure over all batch sizes."""

    images: int
    batch_sizes: tuple[int, ...]
    """At which the first 64 of the images were sent through; the rest in batches of 64."""
    feature_difference_max: float
    """Largest |difference| of the unit-norm features."""
    feature_cosine_min: float
    """Least cosine similarity of a feature of the one with the other's."""
    feature_cosine_mean: float
    top1_agreement_percent: float
    """Answers that are the student's, over all images."""
    student_top1_percent: float | None
    """Of PyTorch's student on these images; None without labels."""
    top1_percent: float | None
    """Of the graph: an image that is wrong at one batch size is wrong."""
    different: int | None = None
    """How many of the images differ from all others, which is what the intervals go by; None: all."""

    @property
    def top1_agreement_interval_percent(self) -> tuple[float, float]:
        """The 95 % confidence interval of the agreement."""
        return wilson_interval_percent(self.top1_agreement_percent, self.different or self.images)

    @property
    def top1_interval_percent(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the graph's top-1; None without labels."""
        if self.top1_percent is None:
            return None
        return wilson_interval_percent(self.top1_percent, self.different or self.images)

    def document(self) -> dict[str, Any]:
        """All figures as plain data, for the manifest."""
        return asdict(self) | {
            "top1_agreement_interval_percent": self.top1_agreement_interval_percent,
            "top1_interval_percent": self.top1_interval_percent,
        }

    @property
    def top1_loss_points(self) -> float:
        """What the graph lost of the student's top-1; 0 without labels."""
        if self.student_top1_percent is None or self.top1_percent is None:
            return 0.0
        return self.student_top1_percent - self.top1_percent

    def failures(self, gate: Gate) -> list[str]:
        """Each figure beyond its limit, with both; nothing where the gate is passed.

        Features that are not numbers pass no gate, however wide.
        """
        checks = {
            "features that are not numbers": bool(np.isfinite(self.feature_difference_max)),
            f"max |difference| {self.feature_difference_max:.2e} (limit {gate.difference_max:.0e})": (
                self.feature_difference_max <= gate.difference_max
            ),
            f"least cosine {self.feature_cosine_min:.6f} (limit {gate.cosine_min})": (
                self.feature_cosine_min >= gate.cosine_min
            ),
            f"top-1 agreement {self.top1_agreement_percent:.2f} % (limit {gate.agreement_min_percent:g} %)": (
                self.top1_agreement_percent >= gate.agreement_min_percent
            ),
            f"top-1 loss {self.top1_loss_points:.2f} points (limit {gate.top1_loss_max_points:g})": (
                self.top1_loss_points <= gate.top1_loss_max_points
            ),
        }
        return [figure for figure, passed in checks.items() if not passed]

    def figures(self) -> str:
        """One line with what was measured."""
        labelled = f", top-1 {self.top1_percent:.2f} %" if self.top1_percent is not None else ""
        low, high = self.top1_agreement_interval_percent
        return (
            f"max |difference| {self.feature_difference_max:.2e}, least cosine {self.feature_cosine_min:.6f}, "
            f"top-1 agreement {self.top1_agreement_percent:.2f} % (95 % interval {low:.1f} to {high:.1f} %){labelled}"
        )


def measure_parity(
    encoder: Path,
    classifier: Path,
    reference: Reference,
    extra: Mapping[str, np.ndarray] | None = None,
    optimization: str = "all",
) -> Parity:
    """Compare the two graphs with what PyTorch answered.

    extra: the class vectors, where they are an input. Features and logits that are not numbers count as the worst
    there are: no answer of theirs is the student's. Raises ExportError without images, where a graph can't be run,
    and where the classifier's logits do not follow from the encoder's features.
    """
    images = reference.images
    if not len(images):
        raise ExportError(f"{encoder.name}: there are no images to compare it on; give some with --images")
    batches = _batches(len(images))
    sent = {name: images[part] for name, part in batches.items()}
    encoded = run_graph(encoder, sent, extra, optimization)
    classified = run_graph(classifier, sent, extra, optimization)
    difference, cosine, cosines = 0.0, 1.0, []
    differing = np.zeros(len(images), dtype=bool)
    wrong = np.zeros(len(images), dtype=bool)
    expected = reference.logits.argmax(axis=1)
    labels = reference.labels
    for name, part in batches.items():
        gap = float(np.abs(encoded[name] - reference.features[part]).max())
        similarity = np.sum(encoded[name] * reference.features[part], axis=1) / np.linalg.norm(encoded[name], axis=1)
        difference = max(difference, gap) if np.isfinite(gap) else float("inf")
        cosine = min(cosine, float(similarity.min())) if np.isfinite(similarity).all() else -1.0
        cosines.append(similarity)
        _check_logits(classifier, classified[name], encoded[name], reference.head)
        numbers = np.isfinite(classified[name]).all(axis=1)
        answers = np.where(numbers, classified[name].argmax(axis=1), NO_ANSWER)
        differing[part] |= answers != expected[part]
        if labels is not None:
            wrong[part] |= answers != labels[part]
    return Parity(
        images=len(images),
        batch_sizes=BATCH_SIZES,
        feature_difference_max=difference,
        feature_cosine_min=cosine,
        feature_cosine_mean=float(np.concatenate(cosines).mean()) if cosine > -1 else -1.0,
        top1_agreement_percent=agreement_percent(differing, np.zeros_like(differing)),
        student_top1_percent=None if labels is None else top1_percent(expected, labels),
        top1_percent=None if labels is None else top1_percent(wrong, np.zeros_like(wrong)),
        different=reference.different,
    )


def _check_logits(classifier: Path, logits: np.ndarray, features: np.ndarray, head: np.ndarray | None) -> None:
    """Agreement alone would not notice logits of a wrong scale, which are wrong probabilities. Raises ExportError."""
    if head is None:
        return
    gap = np.abs(logits - features @ head).max()
    limit = LOGIT_TOLERANCE * float(np.linalg.norm(head, axis=0).max())
    if gap > limit:
        raise ExportError(
            f"{classifier.name}: its logits are not logit_scale * features @ class vectors: "
            f"max |difference| {gap:.2e} (limit {limit:.0e})"
        )


def _batches(images: int) -> dict[str, slice]:
    """The first images at every batch size, the rest in whole batches, by a name each."""
    many = min(BATCH_IMAGES, images)
    parts = {f"{size}/{i}": slice(i, min(i + size, many)) for size in BATCH_SIZES for i in range(0, many, size)}
    return parts | {f"rest/{i}": slice(i, min(i + WHOLE_BATCH, images)) for i in range(many, images, WHOLE_BATCH)}
