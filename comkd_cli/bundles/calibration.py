"""Temperature, threshold and their figures, from logits. No torch.

The temperature changes no answer, only how probable it is called: p = softmax(logits / T) (C. Guo et al., 2017,
arXiv 1706.04599, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from comkd_cli.evaluation.metrics import wilson_interval_percent
from comkd_cli.report.statistics import calibration

TEMPERATURES = (0.05, 20.0)
AT_THE_BOUND = 1.05
"""A fitted temperature within this factor of a bound does not count: the loss falls towards 0 or towards chance."""
LEAST_OF_CLASS = 50
"""Images that must be answered as a class for it to get its own threshold."""
TEN_THOUSAND = 10_000  # thresholds have four decimals


@dataclass(frozen=True)
class Negatives:
    """How well images of none of the classes are distinguished from others."""

    images: int
    auroc: float
    """Of the largest probability: an image of the gate against a negative one."""
    false_acceptance_percent: float
    """Negatives whose answer is accepted."""
    false_acceptance_interval_percent: tuple[float, float]
    """Wilson's 95 % confidence interval."""


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float | None:
    """The temperature with the least mean cross-entropy of softmax(logits / T), to four digits.

    logits: (images, classes). targets: int labels (images,), whose cross-entropy is the negative log-likelihood, or
    probabilities (images, classes), such as a teacher's, whose cross-entropy is the KL divergence plus a constant. None
    if the loss has no minimum between TEMPERATURES, as with labels if every answer is right.
    """
    rows = np.arange(len(logits))
    logits = logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / math.exp(log_temperature), axis=1)
        if targets.ndim == 1:
            return float(-log_probabilities[rows, targets].mean())
        return float(-(targets * log_probabilities).sum(axis=1).mean())

    low, high = TEMPERATURES
    found = minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded", options={"xatol": 1e-6})
    temperature = float(f"{math.exp(found.x):.4g}")
    return temperature if low * AT_THE_BOUND < temperature < high / AT_THE_BOUND else None


def fit_threshold(scores: np.ndarray, accept_percent: float) -> float | None:
    """The largest threshold that accepts a new image of the same kind with at least this probability.

    scores: (images,) in [0, 1]; an image is accepted at or above the threshold. This is the k-th smallest score with
    k = floor((images + 1) * (1 - share)), the quantile of split conformal prediction (A. Angelopoulos and S. Bates,
    2021, arXiv 2107.07511, section 1), rounded down to four decimals. None with fewer images than `least_images`.
    """
    rank = math.floor((len(scores) + 1) * (100 - accept_percent) / 100 + 1e-9)
    if rank < 1:
        return None
    score = float(np.sort(scores)[rank - 1])
    return min(score, math.floor(score * TEN_THOUSAND) / TEN_THOUSAND)


def least_images(accept_percent: float) -> int:
    """The least number of images that `fit_threshold` needs."""
    return math.ceil(100 / (100 - accept_percent) - 1e-9) - 1


def class_thresholds(probabilities: np.ndarray, class_names: Sequence[str], accept_percent: float) -> dict[str, float]:
    """By name, the threshold of each class that at least LEAST_OF_CLASS images are answered as.

    Of the images that are answered as a class the same share is accepted. The answer, not the label, selects the
    images, because a device knows only the answer. probabilities: (images, classes).
    """
    answers, scores = probabilities.argmax(axis=1), probabilities.max(axis=1)
    found = {}
    for label, count in enumerate(np.bincount(answers, minlength=len(class_names))):
        if count >= LEAST_OF_CLASS:
            threshold = fit_threshold(scores[answers == label], accept_percent)
            if threshold is not None:
                found[class_names[label]] = threshold
    return found


def calibration_error_percent(probabilities: np.ndarray, expected: np.ndarray) -> float:
    """The expected calibration error in 15 equal bins: |accuracy - confidence|, weighted by images, in percent.

    probabilities: (images, classes). expected: int (images,), the right answers.
    """
    right = probabilities.argmax(axis=1) == expected
    return float(calibration(probabilities.max(axis=1), right).expected_error_percent)


def score_negatives(positive: np.ndarray, negative: np.ndarray, accepted: np.ndarray) -> Negatives:
    """How well a score distinguishes images of none of the classes from others.

    positive: the scores of other images. negative: those of images of no class, and accepted, bool: whether the
    threshold accepts these.
    """
    from sklearn.metrics import roc_auc_score

    is_positive = np.repeat([1, 0], [len(positive), len(negative)])
    share = float(100 * accepted.mean())
    return Negatives(
        images=len(negative),
        auroc=float(roc_auc_score(is_positive, np.concatenate([positive, negative]))),
        false_acceptance_percent=share,
        false_acceptance_interval_percent=wilson_interval_percent(share, len(negative)),
    )
