"""What models answer to a set of images, how sure they are, and how far apart two of them are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from comkd_cli.evaluation.protocols import Evaluation

PROBABILITIES_AT_ONCE = 1 << 22  # of images x classes: memory does not grow with the images


@dataclass(frozen=True)
class Observation:
    """A model that was scored, and its answers among all classes."""

    evaluation: Evaluation
    predicted: np.ndarray
    """(images read,) labels."""


@dataclass(frozen=True)
class Answers:
    """The likeliest class of each image that could be read, and its probability."""

    indices: np.ndarray
    """int64 (images,): positions in the set."""
    predicted: np.ndarray
    """int64 (images,): labels."""
    confidence: np.ndarray
    """float64 (images,): the softmax probability of the answer, in [0, 1]."""


@dataclass(frozen=True)
class Distances:
    """How far apart two models are on each image that both have answered."""

    indices: np.ndarray
    """int64 (images,): positions in the set."""
    values: np.ndarray
    """float64 (images,): total variation distance of the two models' class probabilities, in [0, 1]."""


def answers(seen: Observation) -> Answers:
    """A model's answers with their probabilities: softmax over all classes of its scaled similarities."""
    parts = [chunk[np.arange(len(rows)), seen.predicted[rows]] for rows, chunk in _probabilities(seen)]
    confidence = np.concatenate(parts) if parts else np.empty(0)
    return Answers(seen.evaluation.test.indices, seen.predicted, confidence.astype(np.float64))


def distances(first: Observation, second: Observation) -> Distances:
    """The total variation distance, half the sum over the classes of |p - q|, for each image of both models."""
    common, left, right = np.intersect1d(
        first.evaluation.test.indices, second.evaluation.test.indices, return_indices=True
    )
    pairs = zip(_probabilities(first, left), _probabilities(second, right), strict=True)
    parts = [0.5 * np.abs(mine - theirs).sum(axis=1) for (_, mine), (_, theirs) in pairs]
    return Distances(common, np.concatenate(parts).astype(np.float64) if parts else np.empty(0))


def _probabilities(seen: Observation, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the features and their class probabilities (rows, classes), a part of the images at a time."""
    subject, test = seen.evaluation.subject, seen.evaluation.test
    classes = range(len(seen.evaluation.source.class_names))
    rows = np.arange(len(test.indices)) if rows is None else rows
    most = max(1, PROBABILITIES_AT_ONCE // len(classes))
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        features = subject.features(test.values[part], classes)
        logits = subject.logit_scale * (features @ subject.class_vectors[list(classes)].T)
        yield part, torch.softmax(logits, dim=1).numpy()
