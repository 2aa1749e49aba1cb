import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from comkd_cli.method.refinement import class_logits, refinement


def test_equals_the_figure_worked_by_hand() -> None:
    # teacher: (3/4, 1/4); student: (1/2, 1/2)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert refinement(student, teacher, 1.0).item() == pytest.approx(divergence / 2, abs=1e-12)


@given(st.integers(0, 10_000), st.floats(0.25, 8.0))
def test_equals_scipys_relative_entropy_at_any_temperature(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator) * 4
    by_scipy = sum(
        entropy((t / temperature).softmax(0).numpy(), (s / temperature).softmax(0).numpy())
        for s, t in zip(student, teacher, strict=True)
    )
    expected = temperature**2 * by_scipy / (6 * 5)
    assert refinement(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_is_zero_for_equal_logits_up_to_a_constant() -> None:
    logits = torch.randn(3, 4)
    assert refinement(logits, logits + 7, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_logits_are_scaled_cosines_of_images_and_classes() -> None:
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    class_vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    expected = torch.tensor([[0.0, 50.0, 40.0], [40.0, 30.0, 48.0]])
    assert torch.allclose(class_logits(features, class_vectors, torch.tensor(50.0)), expected)


def test_logits_stay_in_single_precision_under_autocast() -> None:
    features = torch.nn.functional.normalize(torch.randn(8, 64), dim=1)
    exact = class_logits(features, features, torch.tensor(100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(class_logits(features, features, torch.tensor(100.0)), exact)
