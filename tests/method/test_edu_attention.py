import math

import numpy as np
import pytest
import torch

from comkd_cli.method.edu_attention import EduAttention


@pytest.fixture
def open_attention() -> EduAttention:
    torch.manual_seed(3)
    return EduAttention(dim=4, gate_start=0.7).double()


def by_hand(module: EduAttention, features: np.ndarray, memory: np.ndarray, c: float) -> np.ndarray:
    def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
        return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    query = linear(module.query, features / np.linalg.norm(features, axis=1, keepdims=True))
    key, value = linear(module.key, memory), linear(module.value, memory)
    attended = []
    for q in query:
        weights = np.exp(key @ q / math.sqrt(c))
        attended.append((weights / weights.sum()) @ value)
    return features + module.gate.item() * np.stack(attended)


@pytest.mark.parametrize("c", [4.0, 9.0])
def test_equals_the_formula_worked_by_hand(c: float) -> None:
    torch.manual_seed(0)
    module = EduAttention(dim=4, scale=c, gate_start=0.7).double()
    features, memory = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = by_hand(module, features.numpy(), memory.numpy(), c)
    assert np.allclose(module(features, memory).detach().numpy(), expected, atol=1e-12)


def test_takes_the_embedding_width_for_its_scale_by_default(open_attention: EduAttention) -> None:
    features, memory = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = by_hand(open_attention, features.numpy(), memory.numpy(), 4.0)
    assert np.allclose(open_attention(features, memory).detach().numpy(), expected, atol=1e-12)


def test_changes_nothing_while_its_gate_is_shut() -> None:
    module = EduAttention(dim=8)
    features = torch.randn(3, 8)
    assert torch.equal(module(features, torch.randn(5, 8)), features)


def test_a_shut_gate_still_gets_a_gradient_so_that_it_can_open() -> None:
    module = EduAttention(dim=8)
    module(torch.randn(3, 8), torch.randn(5, 8)).square().sum().backward()
    assert module.gate.grad is not None
    assert module.gate.grad.abs() > 0


def test_does_not_depend_on_the_order_of_the_classes(open_attention: EduAttention) -> None:
    features, memory = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(open_attention(features, memory), open_attention(features, memory.flip(0)))
