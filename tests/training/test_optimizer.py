import copy

import pytest
import torch
from torch import nn

from comkd_cli.recipe.model import AdamW, Sgd
from comkd_cli.training.optimizer import load_optimizer_state, make_optimizer
from tests.training.test_loop import Net


def test_adamw_decays_matrices_alone_and_sgd_everything() -> None:
    adamw = make_optimizer(Net(), AdamW(weight_decay=0.1), {})
    decayed = {p.ndim for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    exempt = {p.ndim for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]}
    assert (decayed, exempt) == ({2}, {1})
    sgd = make_optimizer(Net(), Sgd(weight_decay=0.1), {})
    assert {group["weight_decay"] for group in sgd.param_groups} == {0.1}
    assert sum(len(group["params"]) for group in sgd.param_groups) == 6


def test_steps_of_adamw_are_those_of_its_formula() -> None:
    """Decoupled weight decay and bias-corrected moments (arXiv 1711.05101, algorithm 2), in double precision."""
    model = Net()
    optimizer = make_optimizer(model, AdamW(learning_rate=0.01, weight_decay=0.1), {})
    matrix = model.layers[0].weight
    expected, first, second = matrix.detach().double(), 0.0, 0.0
    for step in range(1, 6):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        assert matrix.grad is not None
        gradient = matrix.grad.double()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        unbiased, spread = first / (1 - 0.9**step), second / (1 - 0.999**step)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * unbiased / (spread.sqrt() + 1e-8)
    torch.testing.assert_close(matrix.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved_as", [True, False, None])
def test_the_state_of_another_device_does_not_decide_how_a_step_is_computed(saved_as: bool | None) -> None:
    model = Net()
    earlier, later = make_optimizer(model, AdamW(), {}), make_optimizer(model, AdamW(), {})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    earlier.step()
    state = earlier.state_dict()
    for group in state["param_groups"]:
        group["fused"] = saved_as
    load_optimizer_state(later, state)
    assert {group["fused"] for group in later.param_groups} == {True}
    assert all(torch.equal(later.state[p]["exp_avg"], earlier.state[p]["exp_avg"]) for p in earlier.state)


def test_states_of_sgd_which_older_versions_wrote_without_the_field_still_load() -> None:
    model = Net()
    earlier, later = make_optimizer(model, Sgd(), {}), make_optimizer(model, Sgd(), {})
    state = earlier.state_dict()
    for group in state["param_groups"]:
        del group["fused"]
        group["momentum"] = 0.5
    load_optimizer_state(later, state)
    assert {group["momentum"] for group in later.param_groups} == {0.5}


def test_moments_of_another_memory_layout_belong_to_the_same_weights() -> None:
    """The fused step of a CPU goes through the memory of weights and moments side by side."""
    torch.manual_seed(0)
    tower = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    copied = copy.deepcopy(tower)
    optimizer, later = make_optimizer(tower, AdamW(), {}), make_optimizer(copied, AdamW(), {})

    def step(model: nn.Conv2d, images: torch.Tensor, chosen: torch.optim.Optimizer) -> None:
        model(images).square().mean().backward()
        chosen.step()
        chosen.zero_grad()

    first, second = torch.randn(2, 5, 3, 8, 8)
    step(tower, first, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        moments["exp_avg"], moments["exp_avg_sq"] = (moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq"))
    copied.load_state_dict(tower.state_dict())
    load_optimizer_state(later, state)
    step(tower, second, optimizer)
    step(copied, second, later)
    assert torch.equal(copied.weight, tower.weight)
