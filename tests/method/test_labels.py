import math

import pytest
import torch

from comkd_cli.method.labels import labels_loss


def test_equals_the_figures_worked_by_hand() -> None:
    # softmax of (ln 3, 0) is (3/4, 1/4); the labels take 3/4 and 1/4
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert labels_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, abs=1e-12)


def test_a_guess_among_equals_costs_the_logarithm_of_the_classes() -> None:
    assert labels_loss(torch.zeros(3, 8), torch.tensor([0, 5, 7])).item() == pytest.approx(math.log(8))
