"""Vision prompts against open_clip's own forward pass, and against a forward pass written out here."""

import copy

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from comkd_cli.errors import ModelError
from comkd_cli.method.prompts import VisionPrompts

TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}


def tower(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return CLIP(24, {**VIT, **changes}, TEXT).visual.eval()


def timm_tower(pool: str = "token") -> nn.Module:
    torch.manual_seed(0)
    return CLIP(24, {**TIMM, "timm_pool": pool}, TEXT).visual.eval()


def prompted_by_hand(visual: nn.Module, prompts: Tensor, images: Tensor) -> Tensor:
    """IVLP's image encoder, as PromptSRC describes it, from open_clip's parts: (batch, dim)."""
    count = prompts.shape[1]
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    start = visual.class_embedding.expand(len(images), 1, -1)
    hidden = torch.cat([start, patches], dim=1) + visual.positional_embedding
    hidden = torch.cat([hidden, prompts[0].expand(len(images), -1, -1)], dim=1)
    hidden = visual.ln_pre(hidden)
    for layer, block in enumerate(visual.transformer.resblocks):
        if 0 < layer < len(prompts):
            hidden = torch.cat([hidden[:, :-count], prompts[layer].expand(len(images), -1, -1)], dim=1)
        hidden = block(hidden)
    return visual.ln_post(hidden[:, 0]) @ visual.proj


def vision_transformers() -> list[str]:
    towers = {name: open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()}
    return [n for n, t in towers.items() if "timm_model_name" not in t and not isinstance(t.get("layers"), list)]


@pytest.mark.parametrize("name", vision_transformers())
def test_prompts_of_no_length_change_no_vision_transformer_of_open_clip(name: str) -> None:
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    small = {**vision, "layers": 2, "width": 32, "head_width": 16, "image_size": 2 * vision["patch_size"]}
    small.pop("attn_pooler_heads", None)
    visual = CLIP(24, small, TEXT, quick_gelu=config.get("quick_gelu", False)).visual.eval()
    images = torch.randn(2, 3, small["image_size"], small["image_size"])
    own = visual(images)
    own = own[0] if isinstance(own, tuple) else own
    prompted = VisionPrompts(visual, tokens=0, depth=2)(images)
    assert torch.equal(prompted[0] if isinstance(prompted, tuple) else prompted, own)


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_prompts_of_no_length_give_exactly_open_clips_features(pool: str) -> None:
    visual, images = tower(pool_type=pool), torch.randn(2, 3, 16, 16)
    own = visual(images)
    assert torch.equal(VisionPrompts(visual, tokens=0, depth=3)(images), own)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_prompts_of_no_length_give_exactly_timms_features(pool: str) -> None:
    visual, images = timm_tower(pool), torch.randn(2, 3, 160, 160)
    own = visual(images)
    assert torch.equal(VisionPrompts(visual, tokens=0, depth=2)(images), own)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deep_prompts_equal_the_forward_pass_written_out(depth: int) -> None:
    visual, images = tower(), torch.randn(2, 3, 16, 16)
    untouched = copy.deepcopy(visual)
    prompted = VisionPrompts(visual, tokens=4, depth=depth)
    expected = prompted_by_hand(untouched, prompted.tokens, images)
    assert torch.allclose(prompted(images), expected, atol=1e-6)
    assert not torch.allclose(prompted(images), untouched(images), atol=1e-3)


def test_towers_that_run_tokens_first_are_prompted_alike() -> None:
    visual, images = tower(), torch.randn(2, 3, 16, 16)
    sequence_first = copy.deepcopy(visual)
    sequence_first.transformer.batch_first = False
    for block in sequence_first.transformer.resblocks:
        block.attn.batch_first = False
    torch.manual_seed(5)
    batched = VisionPrompts(visual, tokens=4, depth=3)
    torch.manual_seed(5)
    turned = VisionPrompts(sequence_first, tokens=4, depth=3)
    assert torch.allclose(batched(images), turned(images), atol=1e-6)


def test_an_averaging_tower_averages_the_pictures_tokens_alone() -> None:
    visual, images = tower(pool_type="avg", no_ln_pre=True), torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []
    prompted = VisionPrompts(visual, tokens=4, depth=3)
    visual.ln_post.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    prompted(images)
    assert seen[0].shape[1] == 1 + 4  # the class token and four patches


def test_copies_hold_prompts_of_their_own() -> None:
    prompted, images = VisionPrompts(tower(), tokens=4, depth=3), torch.randn(2, 3, 16, 16)
    before = prompted(images)
    duplicate = copy.deepcopy(prompted)
    with torch.no_grad():
        duplicate.tokens.normal_()
    assert torch.equal(prompted(images), before)
    assert not torch.allclose(duplicate(images), before, atol=1e-3)


def test_prompts_start_small_and_normal() -> None:
    tokens = VisionPrompts(tower(), tokens=64, depth=3).tokens.detach()
    assert tokens.shape == (3, 64, 32)
    assert tokens.std().item() == pytest.approx(0.02, rel=0.05)


def test_more_depth_than_blocks_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        VisionPrompts(tower(), tokens=4, depth=4)
    assert (caught.value.field, caught.value.found) == ("student.prompts.depth", 4)


def test_a_convolutional_tower_is_refused() -> None:
    convolutional = CLIP(24, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32}, TEXT).visual
    with pytest.raises(ModelError) as caught:
        VisionPrompts(convolutional, tokens=4, depth=1)
    assert caught.value.field == "student.prompts"
    assert "train: full" in str(caught.value.remedy)
