"""L-BFGS for several functions at once, whose values and gradients are computed together on a device.

The steps are those of L-BFGS-B without bounds (R. Byrd, P. Lu, J. Nocedal, C. Zhu: SIAM J. Sci. Comput. 16, 1995), as
scipy runs it for scikit-learn's logistic regression: equal directions, line search and stopping rules. If the
tolerance is met far from the minimum, the end depends on the path, so only equal steps give equal answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comkd_cli.evaluation.line_search import MOST_STEP, LineSearch

PAIRS = 10  # of changes of the point and of the gradient, which describe the curvature
MOST_EVALUATIONS = 50  # in a line search
EPSILON = float(np.finfo(np.float64).eps)

Evaluate = Callable[[Tensor, Sequence[int]], tuple[list[float], Tensor]]
"""From points, (functions, n), and the positions of their functions, to values and gradients, (functions, n)."""


@dataclass(frozen=True)
class Stopping:
    """When a descent ends; the defaults are scikit-learn's, but for the iterations, which are those of CLIP's paper."""

    gradient: float = 1e-4
    """The largest absolute component of the gradient."""
    decrease: float = 64 * EPSILON
    """Of the value in one iteration, relative to the value, or to 1 if that is larger."""
    iterations: int = 1000


class Descent:
    """The descent of one function: evaluate it at `trial` and `tell` the result, until it has `ended`."""

    def __init__(self, start: Tensor, stopping: Stopping) -> None:
        """start: (n,)."""
        self.trial = start
        self.ended = False
        self.iterations = 0
        self._stopping = stopping
        self._point = self._gradient = self._direction = start
        self._value = self._slope = 0.0
        self._pairs = _Pairs(start)
        self._search: LineSearch | None = None
        self._evaluations = 0  # in the line search

    def tell(self, value: float, gradient: Tensor) -> None:
        """The function's value and gradient, (n,), at `trial`."""
        slope, steepest = torch.stack([gradient @ self._direction, gradient.abs().max()]).tolist()
        if self._search is None:
            self._move_to_trial(value, gradient)
            if steepest > self._stopping.gradient:
                self._set_out()
            else:
                self.ended = True
            return
        self._evaluations += 1
        step = self._search.step
        if self._search.tell(value, slope):
            self._accept(value, gradient, (slope - self._slope) * step, steepest)
        elif self._evaluations == MOST_EVALUATIONS:
            self._restart()
        else:
            self.trial = self._point + self._search.step * self._direction

    def _accept(self, value: float, gradient: Tensor, curvature: float, steepest: float) -> None:
        """End at the trial, or set out from it. curvature: the product of the point's and the gradient's changes."""
        self.iterations += 1
        decrease, scale = self._value - value, max(abs(self._value), abs(value), 1.0)
        self.ended = (
            steepest <= self._stopping.gradient
            or decrease <= self._stopping.decrease * scale
            or self.iterations == self._stopping.iterations
        )
        if not self.ended and curvature > EPSILON * -self._slope * self._step:
            self._pairs.add(self.trial - self._point, gradient - self._gradient)
        self._move_to_trial(value, gradient)
        if not self.ended:
            self._set_out()

    @property
    def _step(self) -> float:
        return 0.0 if self._search is None else self._search.step

    def _move_to_trial(self, value: float, gradient: Tensor) -> None:
        self._point, self._value, self._gradient = self.trial, value, gradient

    def _set_out(self) -> None:
        """Begin a line search from the point."""
        self._direction = self._pairs.direction(self._gradient)
        self._slope = float(self._gradient @ self._direction)
        if not self._slope < 0:
            self._restart()
            return
        step = 1.0 if self.iterations else min(1 / float(self._direction.norm()), MOST_STEP)
        self._search, self._evaluations = LineSearch(self._value, self._slope, step), 0
        self.trial = self._point + step * self._direction

    def _restart(self) -> None:
        """Search again along the gradient; if that has failed, too, the point is as good as rounding allows."""
        self.trial = self._point
        if not self._pairs.count:
            self.ended = True
            return
        self._pairs = _Pairs(self._point)
        self._set_out()


class _Pairs:
    """The last changes s of the point and y of the gradient, and their inner products.

    A direction is a combination of them and the gradient, whose coefficients follow from inner products alone (W. Chen,
    Z. Wang, J. Zhou: Large-scale L-BFGS using MapReduce, NeurIPS 2014): the memory is read twice, in two products,
    rather than once for each of 20 vectors.
    """

    def __init__(self, like: Tensor) -> None:
        self._vectors = like.new_empty(2 * PAIRS, len(like))  # s and y of each slot
        self._products = np.zeros((2 * PAIRS, 2 * PAIRS))
        self._slots: list[int] = []  # from the oldest pair

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._slots)

    def add(self, s: Tensor, y: Tensor) -> None:
        """A pair, (n,) each, in the place of the oldest of PAIRS."""
        slot = self._slots.pop(0) if len(self._slots) == PAIRS else len(self._slots)
        self._slots.append(slot)
        new = slice(2 * slot, 2 * slot + 2)
        self._vectors[new] = torch.stack([s, y])
        used = 2 * self.count
        found = (self._vectors[:used] @ self._vectors[new].T).cpu().double().numpy()
        self._products[:used, new], self._products[new, :used] = found, found.T

    def direction(self, gradient: Tensor) -> Tensor:
        """Minus the product of the inverse Hessian, as the pairs describe it, and the gradient, (n,)."""
        if not self._slots:
            return -gradient
        used = 2 * self.count
        products = self._products[:used, :used]
        of_gradient = (self._vectors[:used] @ gradient).cpu().double().numpy()
        weights, alphas = np.zeros(used), {}  # of the vectors, in a sum that begins with the gradient
        for slot in reversed(self._slots):
            s, y = 2 * slot, 2 * slot + 1
            alphas[slot] = (of_gradient[s] + products[s] @ weights) / products[s, y]
            weights[y] -= alphas[slot]
        s, y = 2 * self._slots[-1], 2 * self._slots[-1] + 1
        scale = products[s, y] / products[y, y]
        weights *= scale
        for slot in self._slots:
            s, y = 2 * slot, 2 * slot + 1
            weights[s] += alphas[slot] - (scale * of_gradient[y] + products[y] @ weights) / products[s, y]
        combined = torch.as_tensor(weights, dtype=gradient.dtype).to(gradient.device) @ self._vectors[:used]
        return combined.add_(gradient, alpha=float(scale)).neg_()


def minimise(evaluate: Evaluate, starts: Tensor, stopping: Stopping | None = None) -> list[Descent]:
    """Minimise several functions, each from its start, (functions, n).

    Returns the descents; the `trial` of each is where it ended.
    """
    descents = [Descent(start, stopping or Stopping()) for start in starts]
    while active := [position for position, descent in enumerate(descents) if not descent.ended]:
        values, gradients = evaluate(torch.stack([descents[position].trial for position in active]), active)
        for position, value, gradient in zip(active, values, gradients, strict=True):
            descents[position].tell(value, gradient)
    return descents
