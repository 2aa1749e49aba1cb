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


def test_images_without_a_label_do_not_count() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, -1, 0, -1, -1, 3])
    known = torch.tensor([0, 2, 5])
    expected = torch.nn.functional.cross_entropy(logits[known], labels[known])
    loss = labels_loss(logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert gradient[[1, 3, 4]].abs().max() == 0


def test_a_batch_without_labels_costs_nothing_and_has_a_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = labels_loss(logits, torch.full((3,), -1))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(3, 4))
