import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.recipe.model import AdamW, Sgd
from comkd_cli.training.schedule import learning_rate


def rates(optim: Sgd | AdamW, steps: int) -> list[float]:
    """The rate of every step of a run."""
    return [learning_rate(optim, epoch, step, steps) for epoch in range(optim.epochs) for step in range(steps)]


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(20, 1), (5, 1), (7, 0), (6, 3), (1, 1), (1, 0)])
def test_sgd_is_torchs_cosine_stepped_once_an_epoch_after_a_constant_warm_up(epochs: int, warmup_epochs: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.005)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    expected = [1e-5] * min(warmup_epochs, epochs)
    while len(expected) < epochs:
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    steps = 3
    optim = Sgd(epochs=epochs, warmup_epochs=warmup_epochs)
    assert rates(optim, steps) == pytest.approx([rate for rate in expected for _ in range(steps)], rel=1e-9)


def test_sgd_keeps_the_warm_up_rate_of_the_recipe_and_then_begins_at_the_peak() -> None:
    optim = Sgd(epochs=4, learning_rate=0.8, warmup_epochs=2, warmup_learning_rate=0.3)
    assert rates(optim, 1)[:3] == [0.3, 0.3, 0.8]


def test_adamw_climbs_in_a_line_and_falls_in_a_cosine() -> None:
    # One epoch of four steps up, then cos^2(k * 7.5 degrees) for k = 0..11, by hand.
    expected = [0.25, 0.5, 0.75, 1.0]
    expected += [1, 0.982963, 0.933013, 0.853553, 0.75, 0.629410, 0.5, 0.370590, 0.25, 0.146447, 0.066987, 0.017037]
    optim = AdamW(learning_rate=1.0, epochs=4, warmup_epochs=1)
    assert rates(optim, 4) == pytest.approx(expected, abs=1e-6)


def test_adamw_without_a_warm_up_begins_at_the_peak() -> None:
    assert rates(AdamW(learning_rate=2.0, epochs=1, warmup_epochs=0), 2) == pytest.approx([2.0, 1.0])


def test_adamw_with_nothing_but_warm_up_climbs_to_the_peak_at_its_last_step() -> None:
    expected = [step / 6 for step in range(1, 7)]
    for warmup_epochs in (2, 9):
        assert rates(AdamW(learning_rate=1.0, epochs=2, warmup_epochs=warmup_epochs), 3) == pytest.approx(expected)


@given(
    epochs=st.integers(1, 12),
    warmup_epochs=st.integers(0, 14),
    steps=st.integers(1, 12),
    peak=st.floats(1e-6, 10),
)
def test_adamw_is_continuous_never_above_its_peak_and_ends_near_zero(
    epochs: int, warmup_epochs: int, steps: int, peak: float
) -> None:
    all_rates = rates(AdamW(learning_rate=peak, epochs=epochs, warmup_epochs=warmup_epochs), steps)
    rising = min(warmup_epochs, epochs) * steps
    falling = epochs * steps - rising
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in all_rates)
    assert max(all_rates) == pytest.approx(peak)
    # The line's slope, and the steepest that a cosine of this length is.
    steepest = max(peak / rising if rising else 0, peak * math.pi / 2 / falling if falling else 0)
    assert all(abs(later - earlier) <= steepest * (1 + 1e-9) for earlier, later in pairwise(all_rates))
    if falling:
        # sin^2 of half the last step's distance from the end
        assert all_rates[-1] == pytest.approx(peak * math.sin(math.pi / 2 / falling) ** 2)
