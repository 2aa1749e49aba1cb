import torch
from torch import nn

from comkd_cli.models.backbones import build_clip
from comkd_cli.models.costs import multiply_adds, parameters, step_multiply_adds, text_multiply_adds, text_parameters
from comkd_cli.recipe.model import Model
from tests import tiny


def network(device: str = "cpu") -> nn.Sequential:
    with torch.device(device):
        return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), nn.Flatten(), nn.Linear(5 * 16, 7))


def test_parameters_by_hand_each_once() -> None:
    net = network()
    assert parameters(net) == 3 * 5 * 9 + (80 * 7 + 7)
    assert parameters(nn.Sequential(net, net)) == parameters(net)


def test_parameters_of_the_text_tower_are_those_without_the_image_tower() -> None:
    clip = build_clip(Model(config=tiny.CLIP)).model
    assert text_parameters(clip) == parameters(clip) - parameters(clip.visual) - 1  # the logit scale


def test_multiply_adds_by_hand_with_and_without_weights() -> None:
    expected = (16 * 5 * 3 * 9) + 80 * 7
    assert multiply_adds(network(), 8) == expected
    assert multiply_adds(network("meta"), 8) == expected


def test_counting_leaves_the_mode_as_it_was() -> None:
    for training in (True, False):
        net = network().train(training)
        multiply_adds(net, 8)
        assert net.training is training


def test_a_step_costs_three_passes_of_what_is_trained_and_one_of_what_is_frozen() -> None:
    once = (16 * 5 * 3 * 9) + 80 * 7
    assert step_multiply_adds(10, (network(), 8)) == 10 * 3 * once
    assert step_multiply_adds(10, (network(), 8), (network(), 8), text=1000) == 10 * 4 * once + 3000


def test_a_step_that_the_meta_device_cannot_compute_has_no_size() -> None:
    class Reads(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * images.sum().item()

    assert step_multiply_adds(10, (Reads(), 8)) is None


def test_each_token_meets_each_weight_of_the_text_tower_once() -> None:
    clip = build_clip(Model(config=tiny.CLIP)).model
    looked_up = sum(each.numel() for each in (clip.token_embedding.weight, clip.positional_embedding))
    assert text_multiply_adds(clip, 7) == 7 * (text_parameters(clip) + 1 - looked_up)
