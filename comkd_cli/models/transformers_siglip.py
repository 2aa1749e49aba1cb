"""SigLIPs of the transformers library: the same tensors under the names of open_clip's, whose image towers are timm's.

timm's attention pooling has the query apart from keys and values, and transformers' has all three in one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from comkd_cli.models.transformers_clip import IN_BLOCK
from comkd_cli.models.transformers_layout import Blocks, Layout

PATCHES = "vision_model.embeddings.patch_embedding.weight"
WHOLE = "text_model.head.weight", "vision_model.head.probe", "logit_bias", PATCHES
"""Tensors that a whole SigLIP has."""
POOLING, POOLED_BY = "vision_model.head.", "visual.trunk.attn_pool."
IN_POOLING = "vision_model.head.attention.in_proj_"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
NUMBERS = ("logit_scale", "logit_bias")
IN_TIMM_BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
LAYOUT = Layout(
    plain={
        "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
        "text_model.final_layer_norm": "text.ln_final",
        "text_model.head": "text.text_projection",
        "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
        "vision_model.post_layernorm": "visual.trunk.norm",
        f"{POOLING}probe": f"{POOLED_BY}latent",
        f"{POOLING}attention.out_proj": f"{POOLED_BY}proj",
        f"{POOLING}layernorm": f"{POOLED_BY}norm",
        f"{POOLING}mlp.fc1": f"{POOLED_BY}mlp.fc1",
        f"{POOLING}mlp.fc2": f"{POOLED_BY}mlp.fc2",
    },
    blocks={
        "text_model.encoder.layers.": Blocks("text.transformer.resblocks.", IN_BLOCK, "attn.in_proj_"),
        "vision_model.encoder.layers.": Blocks("visual.trunk.blocks.", IN_TIMM_BLOCK, "attn.qkv."),
    },
)


def is_transformers_siglip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of transformers' SiglipModel.

    Not of Siglip2Model, whose patches are rows for a linear layer, so that images may have any aspect ratio.
    """
    return all(name in tensors for name in WHOLE) and tensors[PATCHES].ndim == 4


def siglip_as_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' SiglipModel by the names and in the shapes of open_clip's CustomTextCLIP.

    Tensors that SiglipModel does not have keep their names, so that loading the result names them.
    """
    own = {name: value for name, value in tensors.items() if name != POSITIONS and not name.startswith(IN_POOLING)}
    renamed = LAYOUT.rename(own)
    for name in NUMBERS:
        if name in renamed and renamed[name].numel() == 1:
            renamed[name] = renamed[name].reshape(())
    if POSITIONS in tensors:
        renamed["visual.trunk.pos_embed"] = tensors[POSITIONS][None]
    for kind in ("weight", "bias"):
        if (projections := tensors.get(f"{IN_POOLING}{kind}")) is not None:
            width = len(projections) // 3
            renamed[f"{POOLED_BY}q.{kind}"] = projections[:width]
            renamed[f"{POOLED_BY}kv.{kind}"] = projections[width:]
    return renamed
