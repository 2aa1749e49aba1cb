"""Weights of transformers' CLIPModel in open_clip's models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from comkd_cli.errors import ModelError
from comkd_cli.models.backbones import build_clip, build_image_tower, state_sha256
from comkd_cli.models.transformers_clip import as_open_clip, is_transformers_clip
from comkd_cli.recipe.model import Model
from tests import tiny

MODEL = Model(config={**tiny.CLIP, "quick_gelu": True})


def as_transformers_saves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state_dict under the names of CLIPModel, written from a listing of that model's tensors."""
    saved: dict[str, Tensor] = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    for kind in ("weight", "bias"):
        saved[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        saved[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        saved[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        for own, theirs, layers in (("", "text_model", 1), ("visual.", "vision_model", 2)):
            for layer in range(layers):
                block, there = f"{own}transformer.resblocks.{layer}", f"{theirs}.encoder.layers.{layer}"
                for which, part in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    saved[f"{there}.self_attn.{which}_proj.{kind}"] = part
                saved[f"{there}.self_attn.out_proj.{kind}"] = state[f"{block}.attn.out_proj.{kind}"]
                saved[f"{there}.layer_norm1.{kind}"] = state[f"{block}.ln_1.{kind}"]
                saved[f"{there}.layer_norm2.{kind}"] = state[f"{block}.ln_2.{kind}"]
                saved[f"{there}.mlp.fc1.{kind}"] = state[f"{block}.mlp.c_fc.{kind}"]
                saved[f"{there}.mlp.fc2.{kind}"] = state[f"{block}.mlp.c_proj.{kind}"]
    return {name: value.clone().contiguous() for name, value in saved.items()}


@pytest.fixture(scope="module")
def clip() -> Any:
    return build_clip(MODEL, seed=5).model


@pytest.fixture
def saved(clip: Any, tmp_path: Path) -> Path:
    """A folder as transformers' save_pretrained writes it."""
    save_file(as_transformers_saves(clip.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    return tmp_path / "model.safetensors"


def test_the_clip_that_was_saved_is_loaded(clip: Any, saved: Path) -> None:
    loaded = build_clip(MODEL.model_copy(update={"weights": str(saved)}))
    assert state_sha256(loaded.model) == state_sha256(clip)


def test_its_image_tower_starts_a_student(clip: Any, saved: Path) -> None:
    tower = {key: value for key, value in tiny.CLIP.items() if key != "text_cfg"}
    loaded = build_image_tower(Model(config={**tower, "quick_gelu": True}, weights=str(saved)))
    assert state_sha256(loaded.module) == state_sha256(clip.visual)


def test_it_equals_the_transformers_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vision, text = tiny.CLIP["vision_cfg"], tiny.CLIP["text_cfg"]
    torch.manual_seed(2)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=tiny.CLIP["embed_dim"],
            vision_config={
                "hidden_size": vision["width"],  # type: ignore[index]
                "intermediate_size": 4 * vision["width"],  # type: ignore[index]
                "num_hidden_layers": vision["layers"],  # type: ignore[index]
                "num_attention_heads": vision["width"] // vision["head_width"],  # type: ignore[index]
                "image_size": vision["image_size"],  # type: ignore[index]
                "patch_size": vision["patch_size"],  # type: ignore[index]
            },
            text_config={
                "hidden_size": text["width"],  # type: ignore[index]
                "intermediate_size": 4 * text["width"],  # type: ignore[index]
                "num_hidden_layers": text["layers"],  # type: ignore[index]
                "num_attention_heads": text["heads"],  # type: ignore[index]
                "max_position_embeddings": text["context_length"],  # type: ignore[index]
                "vocab_size": 49408,
                "eos_token_id": 49407,
            },
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = build_clip(MODEL.model_copy(update={"weights": str(tmp_path / "model.safetensors")})).model
    images = torch.randn(3, 3, 16, 16)
    tokens = torch.tensor([[49406, 320, 1125, 49407, 0, 0, 0, 0, 0, 0], [49406, 539, 49407, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        found = theirs(input_ids=tokens, pixel_values=images)
        torch.testing.assert_close(ours.encode_image(images, normalize=True), found.image_embeds, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens, normalize=True), found.text_embeds, atol=1e-5, rtol=1e-4)


def test_gelu_is_refused_where_the_config_beside_it_says_quick_gelu(saved: Path) -> None:
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config=tiny.CLIP, weights=str(saved)))
    assert "QuickGELU" in caught.value.problem


def test_other_sizes_are_named_as_open_clip_has_them(saved: Path) -> None:
    deeper = {**tiny.CLIP["vision_cfg"], "layers": 3}  # type: ignore[dict-item]
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config={**tiny.CLIP, "quick_gelu": True, "vision_cfg": deeper}, weights=str(saved)))
    assert "visual.transformer.resblocks.2." in caught.value.problem


def test_siglip_is_no_clip_and_unknown_tensors_keep_their_names(clip: Any) -> None:
    state = as_transformers_saves(clip.state_dict())
    assert is_transformers_clip(state)
    assert as_open_clip({**state, "vision_model.head.probe": torch.ones(1)})["vision_model.head.probe"] == 1
    del state["visual_projection.weight"]
    assert not is_transformers_clip(state)
