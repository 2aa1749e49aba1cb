from comkd_cli.recipe.model import AdamW, Sgd
from comkd_cli.training.optimizer import make_optimizer
from tests.training.test_loop import Net


def test_adamw_decays_matrices_alone_and_sgd_everything() -> None:
    adamw = make_optimizer(Net(), AdamW(weight_decay=0.1), {})
    decayed = {p.ndim for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    exempt = {p.ndim for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]}
    assert (decayed, exempt) == ({2}, {1})
    sgd = make_optimizer(Net(), Sgd(weight_decay=0.1), {})
    assert {group["weight_decay"] for group in sgd.param_groups} == {0.1}
    assert sum(len(group["params"]) for group in sgd.param_groups) == 6
