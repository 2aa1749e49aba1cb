"""The linear probe of CLIP's paper: logistic regression on frozen image features (arXiv 2103.00020, A.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from comkd_cli.evaluation.logistic import Regressions
from comkd_cli.method.linear_probe import Labelled

STEPS_PER_DECADE = 8
LEAST_EXPONENT, MOST_EXPONENT = -6, 6  # of C, the inverse regularisation
DEFAULT_C = 1.0  # if no validation images can choose it

Advance = Callable[[float], None]
"""Called with the share of the work that is done, in [0, 1]."""


def linear_probe(train: Labelled, val: Labelled, test: Tensor, advance: Advance = lambda share: None) -> np.ndarray:
    """The classes of test features by L-BFGS logistic regression, with C chosen on the validation features.

    test: (images, dim). All on one device. Without validation images C is 1. Returns (test images,) class indices.
    """
    regressions = Regressions(train)
    weights: dict[float, Tensor] = {}

    def accuracies(cs: Sequence[float]) -> list[float]:
        weights.update(zip(cs, regressions.fit(cs), strict=True))
        advance(min(1.0, len(weights) / MOST_FITS))
        return [float((regressions.predict(weights[c], val.features) == val.labels).float().mean()) for c in cs]

    c = best_c(accuracies) if len(val.labels) else DEFAULT_C
    chosen = weights[c] if c in weights else regressions.fit([c])[0]
    predicted: np.ndarray = regressions.predict(chosen, test).cpu().numpy()
    return predicted


def best_c(accuracies: Callable[[Sequence[float]], Sequence[float]]) -> float:
    """The C of highest accuracy by the paper's parametric binary search.

    First C in {1e-6, 1e-4, ..., 1e6}; then the interval around the peak is halved repeatedly, down to 8 steps per
    decade. If accuracies are equal, the smallest C, the simplest model, wins. accuracies: of several C at once;
    each C is evaluated once.
    """
    scores: dict[int, float] = {}
    last = (MOST_EXPONENT - LEAST_EXPONENT) * STEPS_PER_DECADE

    def best_of(positions: Sequence[int]) -> int:
        new = [position for position in positions if position not in scores]
        scores.update(zip(new, accuracies([_c_at(position) for position in new]), strict=True))
        return max(positions, key=lambda position: scores[position])

    stride = 2 * STEPS_PER_DECADE
    best = best_of(range(0, last + 1, stride))
    while stride > 1:
        stride //= 2
        best = best_of([position for position in (best - stride, best, best + stride) if 0 <= position <= last])
    return _c_at(best)


MOST_FITS = 7 + 2 * 4  # of a search: the first level, and two at each of the others


def _c_at(position: int) -> float:
    return float(10.0 ** (LEAST_EXPONENT + position / STEPS_PER_DECADE))
