"""SigLIPs of big_vision, Google's own code, by open_clip's conversion of its .npz files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comkd_cli.errors import ModelError
from comkd_cli.models.backbones import build_clip, state_sha256
from comkd_cli.recipe.model import Model
from tests import siglip

HEADS = 2


def attention(name: str, qkv: list[Any], out: Any) -> dict[str, np.ndarray]:
    """big_vision's arrays of an attention, whose matrices have their heads apart: qkv and out are weight and bias."""
    arrays = {}
    for kind, weight, bias in zip(("query", "key", "value"), *(np.split(part, 3) for part in qkv), strict=True):
        arrays[f"{name}/{kind}/kernel"] = weight.T.reshape(len(weight), HEADS, -1)
        arrays[f"{name}/{kind}/bias"] = bias.reshape(HEADS, -1)
    width = len(out[0])
    arrays[f"{name}/out/kernel"] = out[0].reshape(width, HEADS, -1).transpose(1, 2, 0)
    arrays[f"{name}/out/bias"] = out[1]
    return arrays


def as_big_vision_saves(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An open_clip state_dict by the names and in the shapes of big_vision's parameters."""

    def both(name: str) -> list[np.ndarray]:
        return [state[f"{name}weight"], state[f"{name}bias"]]

    arrays = {
        "params/t": state["logit_scale"].reshape(1),
        "params/b": state["logit_bias"].reshape(1),
        "params/img/embedding/kernel": state["visual.trunk.patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "params/img/embedding/bias": state["visual.trunk.patch_embed.proj.bias"],
        "params/img/pos_embedding": state["visual.trunk.pos_embed"],
        "params/img/MAPHead_0/probe": state["visual.trunk.attn_pool.latent"],
        "params/txt/Embed_0/embedding": state["text.token_embedding.weight"],
        "params/txt/pos_embedding": state["text.positional_embedding"][None],
    }
    norms = {
        "img/Transformer/encoder_norm": "visual.trunk.norm.",
        "img/MAPHead_0/LayerNorm_0": "visual.trunk.attn_pool.norm.",
        "txt/Encoder_0/encoder_norm": "text.ln_final.",
    }
    linear = {
        "txt/head": "text.text_projection.",
        **{f"img/MAPHead_0/MlpBlock_0/Dense_{i}": f"visual.trunk.attn_pool.mlp.fc{i + 1}." for i in range(2)},
    }
    attentions = {}
    pool = "visual.trunk.attn_pool."
    pooled = [np.concatenate(pair) for pair in zip(both(f"{pool}q."), both(f"{pool}kv."), strict=True)]
    attentions["img/MAPHead_0/MultiHeadDotProductAttention_0"] = pooled, both(f"{pool}proj.")
    for there, own, parts in (
        *(
            ("img/Transformer", f"visual.trunk.blocks.{i}.", ("norm", "attn.qkv.", "attn.proj.", "fc"))
            for i in range(2)
        ),
        ("txt/Encoder_0", "text.transformer.resblocks.0.", ("ln_", "attn.in_proj_", "attn.out_proj.", "c_")),
    ):
        number = own.split(".")[-2]
        block, (norm, qkv, out, dense) = f"{there}/encoderblock_{number}", parts
        norms |= {f"{block}/LayerNorm_{i}": f"{own}{norm}{i + 1}." for i in range(2)}
        names = ("fc1", "fc2") if dense == "fc" else ("c_fc", "c_proj")
        linear |= {f"{block}/MlpBlock_0/Dense_{i}": f"{own}mlp.{name}." for i, name in enumerate(names)}
        attentions[f"{block}/MultiHeadDotProductAttention_0"] = both(f"{own}{qkv}"), both(f"{own}{out}")
    for name, of in norms.items():
        arrays[f"params/{name}/scale"], arrays[f"params/{name}/bias"] = both(of)
    for name, of in linear.items():
        arrays[f"params/{name}/kernel"], arrays[f"params/{name}/bias"] = state[f"{of}weight"].T, state[f"{of}bias"]
    for name, (qkv, out) in attentions.items():
        arrays |= attention(f"params/{name}", qkv, out)
    return arrays


def test_the_siglip_that_was_saved_is_loaded(tmp_path: Path) -> None:
    config = siglip.config(siglip.write_tokenizer(tmp_path / "tokenizer"))
    clip = build_clip(Model(config=config), seed=5).model
    with torch.no_grad():
        for parameter in clip.parameters():  # some start as zeros, which would hide a wrong place
            parameter.normal_()
    arrays = as_big_vision_saves({name: value.numpy() for name, value in clip.state_dict().items()})
    np.savez(tmp_path / "siglip.npz", **arrays)  # type: ignore[arg-type]
    loaded = build_clip(Model(config=config, weights=str(tmp_path / "siglip.npz")), seed=6)
    assert state_sha256(loaded.model) == state_sha256(clip)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "siglip.npz").write_bytes(b"")
    config = siglip.config(siglip.write_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config=config, weights=str(tmp_path / "siglip.npz")))
    assert caught.value.path == tmp_path / "siglip.npz"
