"""Weights of transformers' SiglipModel in open_clip's models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from comkd_cli.errors import ModelError
from comkd_cli.models.backbones import build_clip, build_image_tower, state_sha256
from comkd_cli.models.transformers_clip import is_transformers_clip
from comkd_cli.models.transformers_siglip import PATCHES, is_transformers_siglip, siglip_as_open_clip
from comkd_cli.recipe.model import Model
from tests import siglip

MODULES = {
    "text_model.final_layer_norm": "text.ln_final",
    "text_model.head": "text.text_projection",
    "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
    "vision_model.post_layernorm": "visual.trunk.norm",
    "vision_model.head.attention.out_proj": "visual.trunk.attn_pool.proj",
    "vision_model.head.layernorm": "visual.trunk.attn_pool.norm",
    "vision_model.head.mlp.fc1": "visual.trunk.attn_pool.mlp.fc1",
    "vision_model.head.mlp.fc2": "visual.trunk.attn_pool.mlp.fc2",
}


def as_transformers_saves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state_dict under the names of SiglipModel, written from a listing of that model's tensors."""
    trunk = "visual.trunk"
    saved: dict[str, Tensor] = {
        "logit_scale": state["logit_scale"].reshape(1),
        "logit_bias": state["logit_bias"].reshape(1),
        "text_model.embeddings.token_embedding.weight": state["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["text.positional_embedding"],
        "vision_model.embeddings.position_embedding.weight": state[f"{trunk}.pos_embed"][0],
        "vision_model.head.probe": state[f"{trunk}.attn_pool.latent"],
    }
    for kind in ("weight", "bias"):
        saved |= {f"{theirs}.{kind}": state[f"{own}.{kind}"] for theirs, own in MODULES.items()}
        query, both = (state[f"{trunk}.attn_pool.{part}.{kind}"] for part in ("q", "kv"))
        saved[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat([query, both])
        block, there = "text.transformer.resblocks.0", "text_model.encoder.layers.0"
        for which, part in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
            saved[f"{there}.self_attn.{which}_proj.{kind}"] = part
        for theirs, own in (
            ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            saved[f"{there}.{theirs}.{kind}"] = state[f"{block}.{own}.{kind}"]
        for layer in range(2):
            block, there = f"{trunk}.blocks.{layer}", f"vision_model.encoder.layers.{layer}"
            for which, part in zip("qkv", state[f"{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                saved[f"{there}.self_attn.{which}_proj.{kind}"] = part
            for theirs, own in (
                ("self_attn.out_proj", "attn.proj"),
                ("layer_norm1", "norm1"),
                ("layer_norm2", "norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                saved[f"{there}.{theirs}.{kind}"] = state[f"{block}.{own}.{kind}"]
    return {name: value.clone().contiguous() for name, value in saved.items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return siglip.config(siglip.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def clip(config: dict[str, Any]) -> Any:
    return build_clip(Model(config=config), seed=5).model


@pytest.fixture
def saved(clip: Any, tmp_path: Path) -> Path:
    """A folder as transformers' save_pretrained writes it."""
    save_file(as_transformers_saves(clip.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "architectures": ["SiglipModel"]}))
    return tmp_path / "model.safetensors"


def test_the_siglip_that_was_saved_is_loaded(clip: Any, saved: Path, config: dict[str, Any]) -> None:
    loaded = build_clip(Model(config=config, weights=str(saved)), seed=6)
    assert state_sha256(loaded.model) == state_sha256(clip)


def test_its_image_tower_starts_a_student(clip: Any, saved: Path, config: dict[str, Any]) -> None:
    tower = {key: value for key, value in config.items() if key != "text_cfg"}
    loaded = build_image_tower(Model(config=tower, weights=str(saved)), seed=6)
    assert state_sha256(loaded.module) == state_sha256(clip.visual)


def test_other_sizes_are_named_as_open_clip_has_them(saved: Path, config: dict[str, Any]) -> None:
    deeper = {**config["text_cfg"], "layers": 3}
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config={**config, "text_cfg": deeper}, weights=str(saved)))
    assert "text.transformer.resblocks." in caught.value.problem


def test_only_a_whole_siglip_of_patches_is_converted(clip: Any) -> None:
    state = as_transformers_saves(clip.state_dict())
    assert is_transformers_siglip(state)
    assert not is_transformers_clip(state)
    assert siglip_as_open_clip({**state, "vision_model.head.other": torch.ones(1)})["vision_model.head.other"] == 1
    assert not is_transformers_siglip({**state, PATCHES: state[PATCHES].flatten(1)})  # of Siglip2Model
    del state["text_model.head.weight"]
    assert not is_transformers_siglip(state)


def test_it_equals_the_transformers_library(tmp_path: Path, config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    text = config["text_cfg"]
    torch.manual_seed(2)
    theirs = transformers.SiglipModel(
        transformers.SiglipConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "hidden_act": "gelu",
            },
            text_config={
                "hidden_size": text["width"],
                "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text["context_length"],
                "vocab_size": text["vocab_size"],
                "projection_size": config["embed_dim"],
                "hidden_act": "gelu",
            },
        )
    ).eval()
    for parameter in theirs.parameters():  # some start as zeros, which would hide a wrong place
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = build_clip(Model(config=config, weights=str(tmp_path / "model.safetensors"))).model
    images = torch.randn(3, 3, 16, 16)
    tokens = torch.randint(0, text["vocab_size"], (2, text["context_length"]))
    with torch.no_grad():
        found = theirs(input_ids=tokens, pixel_values=images)
        torch.testing.assert_close(ours.encode_image(images, normalize=True), found.image_embeds, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens, normalize=True), found.text_embeds, atol=1e-5, rtol=1e-4)
        logits, _ = ours.get_logits(images, tokens)
        torch.testing.assert_close(logits, found.logits_per_image, atol=1e-4, rtol=1e-4)
