import pytest
import torch
from torch import nn

from comkd_cli.method.feature_cosine import feature_cosine
from comkd_cli.method.feature_mse import feature_mse


def test_equals_the_figures_worked_by_hand() -> None:
    # differences (-0.4, 0.8) and (0, 0): (0.16 + 0.64) / 4 values
    student = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert feature_mse(student, teacher).item() == pytest.approx(0.2, abs=1e-12)


def test_is_that_of_pytorch() -> None:
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert feature_mse(student, teacher).item() == pytest.approx(nn.MSELoss()(student, teacher).item())


def test_on_unit_vectors_it_is_the_cosine_term_times_two_over_the_dimensions() -> None:
    student, teacher = nn.functional.normalize(torch.randn(2, 9, 7, dtype=torch.float64), dim=-1)
    by_angle = feature_cosine(student, teacher).item()
    assert feature_mse(student, teacher).item() == pytest.approx(2 * by_angle / 7, rel=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    student = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: feature_mse(x, torch.ones_like(x)), student)
