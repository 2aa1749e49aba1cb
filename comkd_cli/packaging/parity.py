"""Parity: whether an exported graph answers as the student does, on real images and at several batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comkd_cli.packaging.runner import run_graph

BATCH_SIZES = (1, 2, 7)
MOST_DIFFERENCE = 1e-4
LEAST_COSINE = 0.99999


@dataclass(frozen=True)
class Parity:
    """How far the graphs' answers are from PyTorch's, over all batch sizes: the worst of each figure."""

    images: int
    batch_sizes: tuple[int, ...]
    feature_difference_max: float
    """Largest |difference| of the unit-norm features."""
    feature_cosine_min: float
    """Least cosine similarity of a feature of the one with the other's."""
    top1_differing: int
    """Answers, over all batch sizes, whose likeliest class is another."""

    @property
    def holds(self) -> bool:
        """Whether every figure is within its limit."""
        return (
            self.feature_difference_max <= MOST_DIFFERENCE
            and self.feature_cosine_min >= LEAST_COSINE
            and self.top1_differing == 0
        )

    def figures(self) -> str:
        """One line with each figure beside its limit."""
        return (
            f"max |difference| {self.feature_difference_max:.2e} (limit {MOST_DIFFERENCE:.0e}), "
            f"cosine {self.feature_cosine_min:.7f} (limit {LEAST_COSINE}), "
            f"{self.top1_differing} of {self.images * len(self.batch_sizes)} answers differ (limit 0), "
            f"{self.images} images at batch sizes {', '.join(map(str, self.batch_sizes))}"
        )


def measure_parity(
    encoder: Path, classifier: Path, images: np.ndarray, features: np.ndarray, logits: np.ndarray
) -> Parity:
    """Compare the two graphs with what PyTorch answered.

    images: float32 (images, 3, size, size). features: (images, dim), L2-normalised, and logits: (images,
    classes), both PyTorch's. Figures that are not numbers count as the worst there is. Raises ExportError
    where a graph can't be run.
    """
    batches = {
        f"{size}/{start}": images[start : start + size] for size in BATCH_SIZES for start in range(0, len(images), size)
    }
    encoded = _by_size(run_graph(encoder, batches))
    classified = _by_size(run_graph(classifier, batches))
    difference, cosine, differing = 0.0, 1.0, 0
    for size in BATCH_SIZES:
        gap = np.abs(encoded[size] - features).max()
        least = np.min(np.sum(encoded[size] * features, axis=1) / np.linalg.norm(encoded[size], axis=1))
        difference = max(difference, float(gap)) if np.isfinite(gap) else float("inf")
        cosine = min(cosine, float(least)) if np.isfinite(least) else -1.0
        differing += int(np.sum(classified[size].argmax(axis=1) != logits.argmax(axis=1)))
    return Parity(len(images), BATCH_SIZES, difference, cosine, differing)


def _by_size(answers: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """The answers of each batch size, in the order of the images."""
    parts: dict[int, dict[int, np.ndarray]] = {}
    for name, answer in answers.items():
        size, start = map(int, name.split("/"))
        parts.setdefault(size, {})[start] = answer
    return {size: np.concatenate([by_start[s] for s in sorted(by_start)]) for size, by_start in parts.items()}
