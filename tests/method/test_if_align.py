import pytest
import torch

from comkd_cli.errors import BatchTooSmallError
from comkd_cli.method.if_align import if_align


def test_equals_the_figures_worked_by_hand() -> None:
    # means: student (0.3, 0.9), teacher (0.5, 0.5); variances: student (0.09, 0.01), teacher (0.25, 0.25)
    student = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    by_hand = (0.2 + 0.4) + (0.16 + 0.24)
    assert if_align(student, teacher).item() == pytest.approx(by_hand, abs=1e-12)


def test_is_zero_for_equal_statistics_even_where_the_images_differ() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert if_align(student, student.flip(0)).item() == 0.0


def test_sums_over_dimensions_so_unused_ones_add_nothing() -> None:
    student, teacher = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    padded = [torch.cat([x, torch.zeros(5, 4, dtype=torch.float64)], dim=1) for x in (student, teacher)]
    assert if_align(*padded).item() == pytest.approx(if_align(student, teacher).item())


def test_gradient_is_that_of_finite_differences() -> None:
    student = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.rand(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: if_align(x, teacher), student)


def test_refuses_a_batch_of_one() -> None:
    with pytest.raises(BatchTooSmallError, match="at least 2") as caught:
        if_align(torch.ones(1, 4), torch.ones(1, 4))
    assert caught.value.found == 1
