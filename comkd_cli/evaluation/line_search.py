"""The line search of Moré and Thuente, "Line Search Algorithms with Guaranteed Sufficient Decrease" (ACM TOMS, 1994).

With the constants of L-BFGS-B, which scikit-learn's logistic regression uses: from equal values it takes equal steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SUFFICIENT_DECREASE, CURVATURE, LEAST_INTERVAL = 1e-3, 0.9, 0.1
LEAST_GROWTH, MOST_GROWTH = 1.1, 4.0  # of a step, while no interval around a minimum is known
SHRINKAGE = 0.66  # that an interval must reach within two steps, else it is halved
MOST_STEP = 1e10


class Point(NamedTuple):
    """A step, with the function's value and its derivative along the direction there."""

    step: float
    value: float
    slope: float


class LineSearch:
    """Proposes steps along a direction: evaluate the function at `step`, `tell` what was found, until `tell` is true.

    Then `step`, the last that was evaluated, decreases the function enough and flattens it, or is as good as rounding
    allows.
    """

    def __init__(self, value: float, slope: float, step: float) -> None:
        """value, slope: of the function at step 0; the slope is negative. step: the first to try."""
        self.step = step
        self._start = Point(0.0, value, slope)
        self._decrease = SUFFICIENT_DECREASE * slope
        self._best = self._end = self._start
        self._bracketed = False
        self._auxiliary = True  # the first stage of the paper: the function minus its sufficient decrease is searched
        self._width, self._width_before = MOST_STEP, 2 * MOST_STEP
        self._least, self._most = 0.0, step + MOST_GROWTH * step

    def tell(self, value: float, slope: float) -> bool:
        """The function's value and slope at `step`. Returns whether the search ends there; else `step` is the next."""
        enough = self._start.value + self.step * self._decrease
        if self._auxiliary and value <= enough and slope >= 0:
            self._auxiliary = False
        if self._ends(value, slope, enough):
            return True
        tried = Point(self.step, value, slope)
        if self._auxiliary and enough < value <= self._best.value:
            step = self._narrow(*(self._lowered(point, -1) for point in (self._best, self._end, tried)))
            self._best, self._end = self._lowered(self._best, 1), self._lowered(self._end, 1)
        else:
            step = self._narrow(self._best, self._end, tried)
        self.step = self._within_bounds(step)
        return False

    def _ends(self, value: float, slope: float, enough: float) -> bool:
        if self._bracketed:
            if not self._least < self.step < self._most:
                return True
            if self._most - self._least <= LEAST_INTERVAL * self._most:
                return True
        if self.step == MOST_STEP and value <= enough and slope <= self._decrease:
            return True
        if self.step == 0 and (value > enough or slope >= self._decrease):
            return True
        return value <= enough and abs(slope) <= CURVATURE * -self._start.slope

    def _lowered(self, point: Point, sign: int) -> Point:
        """A point of the auxiliary function (sign -1), or back from it (sign 1)."""
        shift = sign * self._decrease
        return Point(point.step, point.value + point.step * shift, point.slope + shift)

    def _narrow(self, best: Point, end: Point, tried: Point) -> float:
        """Replace the ends of the interval by a tried point, and return the next step, before bounds of growth."""
        step, bracketed = _next_step(best, end, tried, self._bracketed, (self._least, self._most))
        if tried.value > best.value:
            end = tried
        else:
            if tried.slope * best.slope < 0:
                end = best
            best = tried
        self._best, self._end, self._bracketed = best, end, bracketed
        return step

    def _within_bounds(self, step: float) -> float:
        best, end = self._best.step, self._end.step
        if self._bracketed:
            if abs(end - best) >= SHRINKAGE * self._width_before:
                step = best + 0.5 * (end - best)
            self._width_before, self._width = self._width, abs(end - best)
            self._least, self._most = min(best, end), max(best, end)
        else:
            self._least = step + LEAST_GROWTH * (step - best)
            self._most = step + MOST_GROWTH * (step - best)
        step = min(max(step, 0.0), MOST_STEP)
        stuck = self._bracketed and (
            not self._least < step < self._most or self._most - self._least <= LEAST_INTERVAL * self._most
        )
        return best if stuck else step


def _next_step(
    best: Point, end: Point, tried: Point, bracketed: bool, bounds: tuple[float, float]
) -> tuple[float, bool]:
    """The safeguarded cubic or quadratic step of the paper's section 4, and whether a minimum is bracketed now."""
    if tried.value > best.value:  # case 1: a minimum lies between best and tried
        cubic, quadratic = _cubic(best, tried), _quadratic(best, tried)
        nearer = abs(cubic - best.step) <= abs(quadratic - best.step)
        return (cubic if nearer else cubic + (quadratic - cubic) / 2), True
    if tried.slope * best.slope < 0:  # case 2: the derivative changes its sign
        cubic, secant = _cubic(tried, best), _secant(best, tried)
        return (cubic if abs(cubic - tried.step) > abs(secant - tried.step) else secant), True
    if abs(tried.slope) < abs(best.slope):  # case 3: the slope becomes flatter
        return _flatter_step(best, end, tried, bracketed, bounds), bracketed
    if bracketed:  # case 4
        return _cubic(tried, end), True
    return (bounds[1] if tried.step > best.step else bounds[0]), False


def _flatter_step(best: Point, end: Point, tried: Point, bracketed: bool, bounds: tuple[float, float]) -> float:
    """Case 3: the cubic's minimum counts only if the cubic tends to infinity beyond it, or lies beyond `tried`."""
    cubic, secant = _cubic_beyond(best, tried, bounds), _secant(best, tried)
    nearer = abs(cubic - tried.step) < abs(secant - tried.step)
    if not bracketed:
        return min(max(secant if nearer else cubic, bounds[0]), bounds[1])
    step = cubic if nearer else secant
    limit = tried.step + SHRINKAGE * (end.step - tried.step)
    return min(limit, step) if tried.step > best.step else max(limit, step)


def _cubic(first: Point, second: Point) -> float:
    """The minimum of the cubic through the values and slopes at two steps, as a step from the first."""
    theta = 3 * (first.value - second.value) / (second.step - first.step) + first.slope + second.slope
    scale = max(abs(theta), abs(first.slope), abs(second.slope))
    gamma = scale * math.sqrt(max(0.0, (theta / scale) ** 2 - first.slope / scale * (second.slope / scale)))
    if second.step < first.step:
        gamma = -gamma
    ratio = (gamma - first.slope + theta) / (gamma - first.slope + gamma + second.slope)
    return first.step + ratio * (second.step - first.step)


def _cubic_beyond(best: Point, tried: Point, bounds: tuple[float, float]) -> float:
    theta = 3 * (best.value - tried.value) / (tried.step - best.step) + best.slope + tried.slope
    scale = max(abs(theta), abs(best.slope), abs(tried.slope))
    gamma = scale * math.sqrt(max(0.0, (theta / scale) ** 2 - best.slope / scale * (tried.slope / scale)))
    if tried.step > best.step:
        gamma = -gamma
    ratio = (gamma - tried.slope + theta) / (gamma + (best.slope - tried.slope) + gamma)
    if ratio < 0 and gamma != 0:
        return tried.step + ratio * (best.step - tried.step)
    return bounds[1] if tried.step > best.step else bounds[0]


def _quadratic(best: Point, tried: Point) -> float:
    """The minimum of the parabola through both values and the slope at `best`."""
    length = tried.step - best.step
    return best.step + best.slope / ((best.value - tried.value) / length + best.slope) / 2 * length


def _secant(best: Point, tried: Point) -> float:
    """Where the slope is zero, if it is linear between the two steps."""
    return tried.step + tried.slope / (tried.slope - best.slope) * (best.step - tried.step)
