"""A SigLIP that is built in a moment, and a tokenizer of a few tokens, in the forms of timm's repositories.

Its image tower is a model of timm that is registered here. The tokenizer is a Unigram model with `</s>` at the end and
as padding, as T5's of 32,000 tokens, which SigLIP has.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from tokenizers import models, normalizers, pre_tokenizers, processors

CONTEXT = 12
SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = (
    *("▁", "▁a", "▁the", "▁photo", "▁of", "▁number", "▁red", "▁fox", "▁cat", "▁do", "g", "▁two", "ing", "s"),
    *"abcdefhijklmnopqrtuvwxyz0123456789äöü.!",
)
IDS = {piece: position for position, piece in enumerate((*SPECIAL, *PIECES))}

default_cfgs = generate_default_cfgs({"vit_siglip_of_tests": {"input_size": (3, 16, 16)}})


@register_model
def vit_siglip_of_tests(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """Two blocks without a class token, and attention pooling."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
    built: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "vit_siglip_of_tests", pretrained, **(sizes | settings)
    )
    return built


def config(tokenizer: Path) -> dict[str, Any]:
    """The fields of open_clip's ViT-B-16-SigLIP.json with small sizes, and the tokenizer of a folder."""
    return {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 16,
            "timm_model_name": "vit_siglip_of_tests",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(IDS),
            "hf_tokenizer_name": str(tokenizer),
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 16,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }


def definition() -> str:
    """The content of tokenizer.json."""
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + [(piece, -1.0 - 1e-3 * i) for i, piece in enumerate(PIECES)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, **changes: object) -> Path:
    """Write tokenizer.json and tokenizer_config.json, with fields changed or, if they are None, left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(definition(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": CONTEXT,
        **changes,
    }
    kept = {field: value for field, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder
