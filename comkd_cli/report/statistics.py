"""What the report counts from answers: intervals, scores of each class, confusions, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from comkd_cli.evaluation.metrics import wilson_interval_percent

SEED = 0
RESAMPLES = 5_000
RESAMPLES_AT_ONCE = 500  # of up to twice as many counts as there are classes
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval, in percent or in points of percent."""

    low: float
    high: float


@dataclass(frozen=True)
class ClassScore:
    """How a model does on one class."""

    label: int
    support: int
    """Images of the class."""
    answered: int
    """Images that the model puts in it."""
    right: int

    @property
    def precision(self) -> float | None:
        """The share of its answers that are right; None if the class was never answered."""
        return self.right / self.answered if self.answered else None

    @property
    def recall(self) -> float | None:
        """The share of its images that are found; None if it has none."""
        return self.right / self.support if self.support else None

    @property
    def errors(self) -> int:
        """Images of the class that went elsewhere, and images of others that came here."""
        return self.support + self.answered - 2 * self.right


@dataclass(frozen=True)
class Confusion:
    """How often images of one class were put in another."""

    actual: int
    answered: int
    images: int
    share: float
    """Of the images of the actual class."""


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose confidence lies within one of the equal bins of [0, 1]."""

    images: int
    confidence: float
    """Their mean confidence."""
    accuracy: float
    """The share that is right."""


@dataclass(frozen=True)
class Calibration:
    """How well confidence matches accuracy."""

    bins: tuple[CalibrationBin, ...]
    """Those that hold images, by rising confidence."""
    expected_error_percent: float
    """Expected calibration error: |accuracy - confidence| of each bin, weighted by its images, in percent."""


def share_interval(right: np.ndarray) -> Interval:
    """The interval of a share of images, by the bootstrap over images. right: bool (images,).

    If all or none are right, every resample is the same, and Wilson's interval is returned instead.
    """
    count = int(right.sum())
    if count in (0, len(right)):
        return Interval(*wilson_interval_percent(100 * count / len(right), len(right)))
    return _interval(np.array([len(right) - count, count]), lambda counts: 100 * counts[:, 1] / len(right))


def mean_per_class_interval(predicted: np.ndarray, labels: np.ndarray) -> Interval:
    """The interval of the mean over the classes of each class's own top-1. predicted, labels: (images,).

    A class that a resample holds no image of does not count in it, as in the figure itself.
    """
    classes, position = np.unique(labels, return_inverse=True)
    right = np.bincount(position, weights=predicted == labels, minlength=len(classes)).astype(np.int64)
    support = np.bincount(position, minlength=len(classes))

    def statistic(counts: np.ndarray) -> np.ndarray:
        wrong, found = counts[:, : len(classes)], counts[:, len(classes) :]
        total = wrong + found
        shares = np.divide(found, total, out=np.full(total.shape, np.nan), where=total > 0)
        means: np.ndarray = 100 * np.nanmean(shares, axis=1)
        return means

    return _interval(np.concatenate([support - right, right]), statistic)


def difference_interval(first: np.ndarray, second: np.ndarray) -> Interval:
    """The interval of one model's share minus another's on the same images, in points. Both bool (images,).

    Paired: each resample draws images and uses both models' answers to them.
    """
    cells = np.bincount(2 * first.astype(np.int64) + second, minlength=4)
    return _interval(cells, lambda counts: 100 * (counts[:, 2] - counts[:, 1]) / len(first))


def class_scores(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[ClassScore]:
    """The scores of each class, in the order of the labels. predicted, labels: (images,)."""
    support = np.bincount(labels, minlength=classes)
    answered = np.bincount(predicted, minlength=classes)
    right = np.bincount(labels[predicted == labels], minlength=classes)
    return [ClassScore(label, int(support[label]), int(answered[label]), int(right[label])) for label in range(classes)]


def confusions(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[Confusion]:
    """Every pair of classes of which one was answered for the other, the most frequent first."""
    wrong = predicted != labels
    codes, counts = np.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    support = np.bincount(labels, minlength=classes)
    order = np.argsort(-counts, kind="stable")
    return [
        Confusion(
            int(codes[i] // classes),
            int(codes[i] % classes),
            int(counts[i]),
            float(counts[i] / support[codes[i] // classes]),
        )
        for i in order
    ]


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): images by their class (rows) and the answer (columns)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = CALIBRATION_BINS) -> Calibration:
    """The calibration of a model in equal bins of its confidence (C. Guo et al., 2017, arXiv 1706.04599, equation 5).

    confidence: (images,) in [0, 1]. right: bool (images,).
    """
    position = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    images = np.bincount(position, minlength=bins)
    sure = np.bincount(position, weights=confidence, minlength=bins)
    found = np.bincount(position, weights=right, minlength=bins)
    filled = np.flatnonzero(images)
    made = tuple(
        CalibrationBin(int(images[i]), float(sure[i] / images[i]), float(found[i] / images[i])) for i in filled
    )
    return Calibration(made, float(100 * np.abs(found - sure).sum() / len(confidence)))


def _interval(counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """The percentile bootstrap of a statistic that depends on images only by how many are of each kind.

    Drawing n of n images with replacement draws the counts of the kinds from a multinomial distribution, so no
    image has to be touched. counts: int (kinds,). statistic: from counts (resamples, kinds) to (resamples,).
    """
    values = np.concatenate([statistic(drawn) for drawn in _resamples(counts)])
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))


def _resamples(counts: np.ndarray) -> Iterator[np.ndarray]:
    random = np.random.default_rng(SEED)
    total = int(counts.sum())
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        yield random.multinomial(total, counts / total, size=RESAMPLES_AT_ONCE)
