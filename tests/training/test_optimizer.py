import pytest
import torch

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


def test_a_cpu_keeps_pytorchs_own_choice_of_how_a_step_is_computed() -> None:
    assert {group["fused"] for group in make_optimizer(Net(), AdamW(), {}).param_groups} == {None}


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
    assert {group["fused"] for group in later.param_groups} == {None}
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
