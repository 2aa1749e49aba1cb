"""CLIPs of the transformers library: the same tensors under open_clip's names.

transformers' projections are linear layers, whose matrices are the transposes of open_clip's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from comkd_cli.models.transformers_layout import Blocks, Layout

WHOLE = "text_projection.weight", "visual_projection.weight", "vision_model.embeddings.class_embedding"
"""Tensors that a whole CLIP has. SigLIP, which has other towers under the same prefixes, lacks them."""
TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
LAYOUT = Layout(
    plain={
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",  # spelt like this
        "vision_model.post_layernorm": "visual.ln_post",
    },
    blocks={
        "text_model.encoder.layers.": Blocks("transformer.resblocks.", IN_BLOCK, "attn.in_proj_"),
        "vision_model.encoder.layers.": Blocks("visual.transformer.resblocks.", IN_BLOCK, "attn.in_proj_"),
    },
)


def is_transformers_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of transformers' CLIPModel."""
    return all(name in tensors for name in WHOLE)


def as_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' CLIPModel by the names and in the shapes of open_clip's CLIP.

    Tensors that CLIPModel does not have keep their names, so that loading the result names them.
    """
    renamed = LAYOUT.rename({name: value for name, value in tensors.items() if name not in TRANSPOSED})
    return renamed | {TRANSPOSED[name]: tensors[name].T.contiguous() for name in TRANSPOSED if name in tensors}
