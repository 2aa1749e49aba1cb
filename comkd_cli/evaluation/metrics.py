"""Accuracies and agreement, from class indices."""

from __future__ import annotations

import numpy as np


def top1_percent(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose likeliest class is their own, in percent. Both (images,)."""
    return float(100 * np.mean(predicted == labels))


def mean_per_class_percent(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes of each class's own top-1, in percent. Classes without images do not count."""
    return float(100 * np.mean([np.mean(predicted[labels == label] == label) for label in np.unique(labels)]))


def agreement_percent(first: np.ndarray, second: np.ndarray) -> float:
    """The share of images that two models put in the same class, right or wrong, in percent."""
    return float(100 * np.mean(first == second))
