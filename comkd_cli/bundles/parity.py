"""Parity: how far exported graphs are from the student in PyTorch, on real images and at several batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.bundles.gates import Gate
from comkd_cli.bundles.runner import run_graph
from comkd_cli.bundles.shapes import fixed_batch
from comkd_cli.errors import ExportError
from comkd_cli.evaluation.metrics import agreement_percent, top1_percent, wilson_interval_percent

BATCH_SIZES = (1, 2, 7)
BATCH_IMAGES = 64
"""Images that are run at every batch size; the others are run once."""
WHOLE_BATCH = 64
NO_CLASS = -1
LOGIT_TOLERANCE = 0.01
"""Of a logit, as a fraction of the logit scale: the two graphs have the same encoder, but may round differently."""


@dataclass(frozen=True)
class Reference:
    """Prepared images and the student's output for them in PyTorch."""

    images: np.ndarray
    """float32 (images, 3, size, size)."""
    features: np.ndarray
    """float32 (images, dim), L2-normalised."""
    logits: np.ndarray
    """float32 (images, classes)."""
    labels: np.ndarray | None
    """int64 (images,), or None for unlabelled images."""
    different: int | None = None
    """Number of images without copies; None: all."""
    head: np.ndarray | None = None
    """float32 (dim, classes): logits are features @ head; None: logits are not checked."""
    batch: int | None = None
    """The fixed length of the graphs' batches; None: any."""


@dataclass(frozen=True)
class Parity:
    """How far the graphs' output is from PyTorch's: the worst of each figure over all batch sizes."""

    images: int
    batch_sizes: tuple[int, ...]
    """For the first 64 images; the rest were run in batches of 64."""
    feature_difference_max: float
    """Largest |difference| of the unit-norm features."""
    feature_cosine_min: float
    """Smallest cosine similarity of an image's features with PyTorch's."""
    feature_cosine_mean: float
    top1_agreement_percent: float
    """Images whose top-1 class is the student's."""
    student_top1_percent: float | None
    """Of the student in PyTorch on these images; None without labels."""
    top1_percent: float | None
    """Of the graph: an image counts as wrong if it is wrong at any batch size."""
    different: int | None = None
    """Number of images without copies, on which the intervals are based; None: all."""
    logits: np.ndarray | None = field(default=None, repr=False, compare=False)
    """float32 (images, classes), the graph's, of the last batch size that an image was run at."""

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
        figures = asdict(replace(self, logits=None))
        del figures["logits"]
        return figures | {
            "top1_agreement_interval_percent": self.top1_agreement_interval_percent,
            "top1_interval_percent": self.top1_interval_percent,
        }

    @property
    def top1_loss_points(self) -> float:
        """Top-1 of the student minus top-1 of the graph; 0 without labels."""
        if self.student_top1_percent is None or self.top1_percent is None:
            return 0.0
        return self.student_top1_percent - self.top1_percent

    def failures(self, gate: Gate) -> list[str]:
        """Each figure that misses its limit, with that limit; empty if the gate is passed.

        Features that are not finite pass no gate, however wide.
        """
        checks = {
            "features that are not finite": bool(np.isfinite(self.feature_difference_max)),
            f"max |difference| {self.feature_difference_max:.2e} (limit {gate.difference_max:.0e})": (
                self.feature_difference_max <= gate.difference_max
            ),
            f"smallest cosine {self.feature_cosine_min:.6f} (limit {gate.cosine_min})": (
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
        """The figures in one line."""
        labelled = f", top-1 {self.top1_percent:.2f} %" if self.top1_percent is not None else ""
        low, high = self.top1_agreement_interval_percent
        return (
            f"max |difference| {self.feature_difference_max:.2e}, smallest cosine {self.feature_cosine_min:.6f}, "
            f"top-1 agreement {self.top1_agreement_percent:.2f} % (95 % interval {low:.1f} to {high:.1f} %){labelled}"
        )


def measure_parity(
    encoder: Path,
    classifier: Path,
    reference: Reference,
    extra: Mapping[str, np.ndarray] | None = None,
    optimization: str = "all",
) -> Parity:
    """Compare the output of the two graphs with PyTorch's.

    extra: the class vectors, if they are an input. Features that are not finite have a cosine of -1, and logits that
    are not finite agree with no class. Raises ExportError without images, if a graph could not be run, and if the
    classifier's logits are not those of the encoder's features.
    """
    images = reference.images
    if not len(images):
        raise ExportError(
            "there are no images to compare it on", path=encoder.name, remedy="provide some with --images"
        )
    if (length := fixed_batch(encoder)) != reference.batch:
        problem = "has a different batch size than expected"
        raise ExportError(problem, path=encoder.name, found=length or "any", allowed=str(reference.batch or "any"))
    batch_sizes = BATCH_SIZES if reference.batch is None else (reference.batch,)
    batches = _batches(len(images), batch_sizes)
    inputs = {name: images[part] for name, part in batches.items()}
    encoded = run_graph(encoder, inputs, extra, optimization)
    classified = run_graph(classifier, inputs, extra, optimization)
    difference, cosine, cosines = 0.0, 1.0, []
    differing = np.zeros(len(images), dtype=bool)
    wrong = np.zeros(len(images), dtype=bool)
    logits = np.empty_like(reference.logits)
    expected = reference.logits.argmax(axis=1)
    labels = reference.labels
    for name, part in batches.items():
        gap = float(np.abs(encoded[name] - reference.features[part]).max())
        similarity = np.sum(encoded[name] * reference.features[part], axis=1) / np.linalg.norm(encoded[name], axis=1)
        difference = max(difference, gap) if np.isfinite(gap) else float("inf")
        cosine = min(cosine, float(similarity.min())) if np.isfinite(similarity).all() else -1.0
        cosines.append(similarity)
        check_logits(classifier, classified[name], encoded[name], reference.head)
        logits[part] = classified[name]
        finite = np.isfinite(classified[name]).all(axis=1)
        predicted = np.where(finite, classified[name].argmax(axis=1), NO_CLASS)
        differing[part] |= predicted != expected[part]
        if labels is not None:
            wrong[part] |= predicted != labels[part]
    return Parity(
        images=len(images),
        batch_sizes=batch_sizes,
        feature_difference_max=difference,
        feature_cosine_min=cosine,
        feature_cosine_mean=float(np.concatenate(cosines).mean()) if cosine > -1 else -1.0,
        top1_agreement_percent=agreement_percent(differing, np.zeros_like(differing)),
        student_top1_percent=None if labels is None else top1_percent(expected, labels),
        top1_percent=None if labels is None else top1_percent(wrong, np.zeros_like(wrong)),
        different=reference.different,
        logits=logits,
    )


def check_logits(classifier: Path, logits: np.ndarray, features: np.ndarray, head: np.ndarray | None) -> None:
    """Check the scale of logits, which top-1 agreement does not depend on but probabilities do. Raises ExportError."""
    if head is None:
        return
    gap = np.abs(logits - features @ head).max()
    limit = LOGIT_TOLERANCE * float(np.linalg.norm(head, axis=0).max())
    if gap > limit:
        raise ExportError(
            "its logits are not logit_scale * features @ class vectors",
            path=classifier.name,
            found=f"max |difference| {gap:.2e}",
            allowed=f"{limit:.0e}",
        )


def _batches(images: int, batch_sizes: Sequence[int]) -> dict[str, slice]:
    """The images of each batch, by its name: the first images at every batch size, then the rest in whole batches."""
    first = min(BATCH_IMAGES, images)
    parts = {f"{size}/{i}": slice(i, min(i + size, first)) for size in batch_sizes for i in range(0, first, size)}
    return parts | {f"rest/{i}": slice(i, min(i + WHOLE_BATCH, images)) for i in range(first, images, WHOLE_BATCH)}
