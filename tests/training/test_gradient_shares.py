import pytest
import torch

from comkd_cli.training.gradient_shares import gradient_shares


def test_shares_are_the_gradient_norms_of_the_terms_over_their_sum() -> None:
    projected = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    # Gradients worked by hand: 2 * projected, 3 everywhere, and none.
    elsewhere = torch.ones((), requires_grad=True)
    terms = {"squares": projected.square().sum(), "sum": 3 * projected.sum(), "other": 2 * elsewhere}
    shares = gradient_shares(terms, projected)
    squares, total = 2 * float(projected.detach().norm()), 3 * 24**0.5
    assert shares["squares"] == pytest.approx(squares / (squares + total))
    assert shares["sum"] == pytest.approx(total / (squares + total))
    assert shares["other"] == 0
    sum(terms.values()).backward()  # type: ignore[union-attr]  # the graph is left for it
    torch.testing.assert_close(projected.grad, 2 * projected.detach() + 3)


def test_terms_without_any_gradient_have_no_share() -> None:
    projected = torch.randn(2, 3, requires_grad=True)
    assert gradient_shares({"zero": (0 * projected).sum()}, projected) == {"zero": 0.0}
