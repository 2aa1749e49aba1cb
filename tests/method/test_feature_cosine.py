import pytest
import torch
from torch import nn

from comkd_cli.method.feature_cosine import feature_cosine


def test_equals_the_figures_worked_by_hand() -> None:
    # cosines 0.6 and -1: one less their mean of -0.2
    student = torch.tensor([[0.6, 0.8], [0.0, -1.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert feature_cosine(student, teacher).item() == pytest.approx(1.2, abs=1e-12)


def test_is_that_of_pytorch_and_zero_for_the_same_directions() -> None:
    student, teacher = nn.functional.normalize(torch.randn(2, 5, 3, dtype=torch.float64), dim=-1)
    expected = nn.CosineEmbeddingLoss()(student, teacher, torch.ones(5)).item()
    assert feature_cosine(student, teacher).item() == pytest.approx(expected, abs=1e-9)
    assert feature_cosine(student, student).item() == pytest.approx(0, abs=1e-12)


def test_each_image_counts_by_itself_unlike_in_the_statistics_of_a_batch() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert feature_cosine(student, student.flip(0)).item() == pytest.approx(1.0)
