from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der

from comkd_cli.evaluation.lbfgs import Stopping, minimise


@dataclass(frozen=True)
class Function:
    """A function with its gradient, as scipy takes them, and a start."""

    name: str
    value: object
    gradient: object
    start: np.ndarray


SCALES = np.logspace(0, 2, 30)
FUNCTIONS = [
    Function("rosenbrock", rosen, rosen_der, np.full(8, -1.0)),
    Function("rosenbrock from afar", rosen, rosen_der, np.array([-30.0, 5.0, 12.0, 0.0])),
    Function("ill-conditioned", lambda x: float(SCALES @ x**2), lambda x: 2 * SCALES * x, np.ones(30)),
    Function("cubic and flat", lambda x: float(np.sum(x**4 - x)), lambda x: 4 * x**3 - 1, np.array([40.0, -3.0])),
    Function(
        "periodic", lambda x: float(np.sum(np.cos(x) + 0.05 * x**2)), lambda x: 0.1 * x - np.sin(x), np.full(5, 0.1)
    ),
]


def evaluate_all(points: torch.Tensor, positions: Sequence[int]) -> tuple[list[float], torch.Tensor]:
    pairs = [(FUNCTIONS[position], point.numpy()) for point, position in zip(points, positions, strict=True)]
    gradients = [torch.from_numpy(function.gradient(point)) for function, point in pairs]
    return [float(function.value(point)) for function, point in pairs], torch.stack(gradients)


def scipys(function: Function, tolerance: float) -> tuple[int, np.ndarray]:
    options = {"gtol": tolerance, "ftol": Stopping().decrease, "maxls": 50, "maxiter": 1000}
    found = minimize(function.value, function.start, jac=function.gradient, method="L-BFGS-B", options=options)
    return found.nit, found.x


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
@pytest.mark.parametrize("position", range(len(FUNCTIONS)), ids=[function.name for function in FUNCTIONS])
def test_it_takes_scipys_steps(position: int, tolerance: float) -> None:
    """Stopped early, a descent is only at scipy's point if it went scipy's way."""
    function = FUNCTIONS[position]
    iterations, end = scipys(function, tolerance)

    def evaluate(points: torch.Tensor, _positions: Sequence[int]) -> tuple[list[float], torch.Tensor]:
        return evaluate_all(points, [position])

    (descent,) = minimise(evaluate, torch.from_numpy(function.start)[None], Stopping(gradient=tolerance))
    assert descent.iterations == iterations > 1
    assert descent.trial.numpy() == pytest.approx(end, rel=1e-5, abs=1e-6)


def test_functions_that_are_minimised_together_end_where_they_do_alone() -> None:
    def evaluate(points: torch.Tensor, positions: Sequence[int]) -> tuple[list[float], torch.Tensor]:
        squares = torch.tensor([[1.0, 100.0], [3.0, 0.1], [7.0, 7.0]], dtype=torch.float64)[list(positions)]
        return (squares * (points - 1) ** 2).sum(dim=1).tolist(), 2 * squares * (points - 1)

    starts = torch.tensor([[5.0, -5.0], [0.0, 100.0], [1.0, 1.0]], dtype=torch.float64)
    together = minimise(evaluate, starts)
    for position, descent in enumerate(together):
        (alone,) = minimise(lambda points, _: evaluate(points, [position]), starts[position : position + 1])  # noqa: B023
        assert torch.equal(descent.trial, alone.trial)
        assert descent.iterations == alone.iterations
    assert together[2].iterations == 0  # it starts at its minimum


def test_it_stops_after_the_iterations_that_it_may_take() -> None:
    (descent,) = minimise(
        lambda points, _: evaluate_all(points, [0]), torch.from_numpy(FUNCTIONS[0].start)[None], Stopping(iterations=3)
    )
    assert descent.iterations == 3


def test_a_function_that_is_not_smooth_ends_at_the_best_point_that_rounding_allows() -> None:
    """At the kink of |x| no step decreases it enough."""

    def evaluate(points: torch.Tensor, _positions: Sequence[int]) -> tuple[list[float], torch.Tensor]:
        return points.abs().sum(dim=1).tolist(), torch.where(points >= 0, 1.0, -1.0).double()

    (descent,) = minimise(evaluate, torch.tensor([[3.0]], dtype=torch.float64))
    assert descent.ended
    assert abs(float(descent.trial)) < 1e-6
