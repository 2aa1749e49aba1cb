"""CLIPs of the transformers library: the same tensors under open_clip's names.

transformers keeps the queries, keys and values of attention apart, and its projections are linear layers, whose
matrices are the transposes of open_clip's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

WHOLE = "text_projection.weight", "visual_projection.weight", "vision_model.embeddings.class_embedding"
"""Tensors that a whole CLIP has. SigLIP, which has other towers under the same prefixes, lacks them."""
BUFFERS = ("embeddings.position_ids",)

PLAIN = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # spelt like this
    "vision_model.post_layernorm": "visual.ln_post",
}
TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
BLOCKS = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}
IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
PROJECTION = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


def is_transformers_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of transformers' CLIPModel."""
    return all(name in tensors for name in WHOLE)


def as_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' CLIPModel by the names and in the shapes of open_clip's CLIP.

    Tensors that CLIPModel does not have keep their names, so that loading the result names them.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.endswith(BUFFERS):
            continue
        if name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = value.T.contiguous()
            continue
        block, rest = _split_block(name)
        if block and (found := PROJECTION.fullmatch(rest)):
            parts.setdefault(f"{block}.attn.in_proj_{found[2]}", {})[found[1]] = value
        elif block:
            renamed[f"{block}.{_renamed(rest, IN_BLOCK)}"] = value
        else:
            renamed[_renamed(name, PLAIN)] = value
    for name, of in parts.items():
        renamed[name] = torch.cat([of[which] for which in "qkv" if which in of])
    return renamed


def _split_block(name: str) -> tuple[str, str]:
    """Open_clip's name of the block that a tensor belongs to, and its name in there; empty outside of blocks."""
    for prefix, block in BLOCKS.items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            return block + number, rest
    return "", name


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name, where `names` has it, or the module that it belongs to."""
    module, _, kind = name.rpartition(".")
    return names.get(name) or (f"{names[module]}.{kind}" if module in names else name)
