import torch
from torch import nn

from comkd_cli.method.projector import projector


def test_two_layers_are_promptkds() -> None:
    kinds = [type(part) for part in projector(6, 4, layers=2)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_one_layer_is_a_linear_map() -> None:
    mapping = projector(6, 4, layers=1).double()
    first, second = torch.randn(2, 5, 6, dtype=torch.float64)
    origin = mapping(torch.zeros(5, 6, dtype=torch.float64))
    assert torch.allclose(mapping(first + second) + origin, mapping(first) + mapping(second))


def test_leads_from_any_width_to_the_teachers() -> None:
    for layers in (1, 2, 3):
        assert projector(6, 4, layers)(torch.randn(3, 6)).shape == (3, 4)


def test_computes_the_two_layers_by_hand_in_inference() -> None:
    module = projector(3, 2, layers=2).double().eval()
    first, norm, _, last = module
    norm.running_mean.copy_(torch.tensor([0.5, -1.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    x = torch.randn(5, 3, dtype=torch.float64)
    hidden = x @ first.weight.T + first.bias
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    assert torch.allclose(module(x), hidden.clamp(min=0) @ last.weight.T + last.bias)
