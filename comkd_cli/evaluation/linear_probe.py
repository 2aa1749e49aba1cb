"""The linear probe of CLIP's paper: logistic regression on frozen image features (arXiv 2103.00020, A.3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

STEPS_PER_DECADE = 8
LEAST_EXPONENT, MOST_EXPONENT = -6, 6  # of C, the inverse regularisation
MOST_ITERATIONS = 1000
DEFAULT_C = 1.0  # where no validation images can choose it


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """The classes of test features by L-BFGS logistic regression, with C chosen on the validation features.

    train, val, test: (images, dim); labels: (images,). Without validation images C is 1. Returns (test images,) class
    indices.
    """
    c = DEFAULT_C
    if len(val):
        c = best_c(lambda candidate: float(np.mean(_fit(train, train_labels, candidate).predict(val) == val_labels)))
    predicted: np.ndarray = _fit(train, train_labels, c).predict(test)
    return predicted


def best_c(accuracy: Callable[[float], float]) -> float:
    """The C of highest accuracy by the paper's parametric binary search.

    First C in {1e-6, 1e-4, ..., 1e6}; then the interval around the peak is halved repeatedly, down to 8 steps per
    decade. Of equal accuracies the smallest C, which is the simplest model, wins.
    """
    scores: dict[int, float] = {}
    last = (MOST_EXPONENT - LEAST_EXPONENT) * STEPS_PER_DECADE

    def score(position: int) -> float:
        if position not in scores:
            scores[position] = accuracy(_c_at(position))
        return scores[position]

    stride = 2 * STEPS_PER_DECADE
    best = max(range(0, last + 1, stride), key=score)
    while stride > 1:
        stride //= 2
        near = [position for position in (best - stride, best, best + stride) if 0 <= position <= last]
        best = max(near, key=score)
    return _c_at(best)


def _c_at(position: int) -> float:
    return float(10.0 ** (LEAST_EXPONENT + position / STEPS_PER_DECADE))


def _fit(features: np.ndarray, labels: np.ndarray, c: float):  # type: ignore[no-untyped-def]
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # At the largest C the optimum is far away; the paper stops after 1,000 iterations as well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # With one image per class, scikit-learn suspects that the labels are the targets of a regression.
        warnings.filterwarnings("ignore", "The number of unique classes is greater than", UserWarning)
        return LogisticRegression(C=c, max_iter=MOST_ITERATIONS).fit(features, labels)
