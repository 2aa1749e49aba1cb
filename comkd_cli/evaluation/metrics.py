"""Accuracies and agreement, from class indices.

NumPy and math, not scikit-learn and scipy.stats: the formulas are a line each, and the imports take about a second.
"""

from __future__ import annotations

import math

import numpy as np

NORMAL_95 = 1.959963984540054  # the 0.975 quantile of the standard normal distribution


def top1_percent(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose predicted class is their label, in percent. Both (images,)."""
    return float(100 * np.mean(predicted == labels))


def mean_per_class_percent(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the top-1 of each class, in percent. Classes without images do not count."""
    return float(100 * np.mean([np.mean(predicted[labels == label] == label) for label in np.unique(labels)]))


def agreement_percent(first: np.ndarray, second: np.ndarray) -> float:
    """The share of images for which two models predict the same class, right or wrong, in percent."""
    return float(100 * np.mean(first == second))


def top_answer(predicted: np.ndarray) -> tuple[int, float]:
    """The class that is predicted most often (the first of several), and its share in percent. predicted: (images,)."""
    classes, counts = np.unique(predicted, return_counts=True)
    most = int(counts.argmax())
    return int(classes[most]), float(100 * counts[most] / len(predicted))


def wilson_interval_percent(share_percent: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share measured on `count` images, in percent.

    Wilson's score interval (E. B. Wilson, 1927), which does not shrink to a point at 0 and 100 % as the normal
    approximation does. Raises ValueError without images.
    """
    if count < 1:
        raise ValueError("a share of no images has no interval")
    share, z2 = share_percent / 100, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
