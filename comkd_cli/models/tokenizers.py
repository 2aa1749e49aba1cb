"""Tokenizers of CLIPs, as open_clip or transformers have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, basic_clean, canonicalize_text
from torch import Tensor

from comkd_cli.errors import ModelError
from comkd_cli.models.architectures import (
    ALLOW_DOWNLOAD,
    architecture_name,
    check_folder,
    download_refusal,
    download_source,
    read_config,
)
from comkd_cli.models.clip import Clip
from comkd_cli.models.weights import first_line
from comkd_cli.recipe.model import SCHEMES, Model
from comkd_cli.runtime.quiet import logging_disabled

ALLOWED_SETTINGS = {"clean", "strip_sep_token", "language"}


def load_tokenizer(model: Model) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer of a model, from texts to token ids (texts, context). Raises ModelError."""
    check_folder(model)
    try:
        with logging_disabled():
            return _load(model)
    except Exception as error:  # open_clip, the Hub's client and transformers raise their own
        refusal = download_refusal(error, _download_source(model))
        remedy = ALLOW_DOWNLOAD if refusal else None
        if refusal is None and isinstance(error, ImportError):
            remedy = "pip install transformers"
        raise ModelError(
            f"the tokenizer of {architecture_name(model)} could not be loaded: {refusal or first_line(error)}",
            field="config" if model.arch is None else "arch",
            remedy=remedy,
        ) from error


def context_length(clip: Clip) -> int:
    """The number of tokens that the text tower reads, those for start and end included."""
    tokenizer: Any = clip.tokenize
    return int(tokenizer.context_length)


def tokens_cut(clip: Clip, texts: Sequence[str]) -> list[int]:
    """The number of tokens that each text is truncated by, mostly 0."""
    tokenizer: Any = clip.tokenize
    room = context_length(clip)
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        # A token is at least one character, so most texts are known to fit without being encoded.
        short = [text.isascii() and "&" not in text and len(text) + 2 <= room for text in texts]
        lengths = [0 if fits else len(tokenizer.encode(text)) + 2 for text, fits in zip(texts, short, strict=True)]
    else:
        lengths, reserved = _lengths_by_transformers(tokenizer, texts)
        room -= reserved
    return [max(0, length - room) for length in lengths]


def bpe_merges(clip: Clip) -> str:
    """The merges of CLIP's byte-pair tokenizer, in order, one pair of symbols per line. Raises ModelError."""
    if not isinstance(clip.tokenize, open_clip.SimpleTokenizer):
        raise ModelError(
            f"the tokenizer of {clip.origin.architecture} is not CLIP's own, the only one that bundles support",
            remedy="export without --text",
        )
    return "".join(f"{first} {second}\n" for first, second in clip.tokenize.bpe_ranks)


def _load(model: Model) -> Callable[[Sequence[str]], Tensor]:
    found: Callable[[Sequence[str]], Tensor]
    if model.arch is not None:
        if model.arch.startswith(SCHEMES):  # open_clip guesses where a repository has no config
            _checked_settings(read_config(model.arch)["model_cfg"].get("text_cfg", {}))
        found = open_clip.get_tokenizer(model.arch)
        return found
    text = (model.config or {})["text_cfg"]
    length, settings = int(text.get("context_length", 77)), _checked_settings(text)
    if text.get("hf_tokenizer_name"):
        mode = text.get("tokenizer_mode")
        found = HFTokenizer(text["hf_tokenizer_name"], context_length=length, tokenizer_mode=mode, **settings)
        return found
    found = open_clip.SimpleTokenizer(context_length=length, **settings)
    return found


def _download_source(model: Model) -> str | None:
    """What the tokenizer is downloaded from, as `download_source`."""
    if model.arch is None or model.arch.startswith(SCHEMES):
        return download_source(model)
    config = open_clip.get_model_config(model.arch) or {}
    return str(config.get("text_cfg", {}).get("hf_tokenizer_name") or f"the vocabulary of {model.arch}")


def _checked_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_kwargs` of a text_cfg, which may only set how texts are cleaned. Raises ValueError.

    A config may be a stranger's, and transformers has settings that run code which comes with a tokenizer.
    """
    settings = dict(text.get("tokenizer_kwargs", {}))
    if unknown := set(settings) - ALLOWED_SETTINGS:
        raise ValueError(
            f"text_cfg.tokenizer_kwargs has {', '.join(sorted(unknown))} (allowed: "
            f"{', '.join(sorted(ALLOWED_SETTINGS))})"
        )
    return settings


def _lengths_by_transformers(tokenizer: Any, texts: Sequence[str]) -> tuple[list[int], int]:
    """The number of tokens of each text, and the number of special tokens that it does not include."""
    if isinstance(tokenizer, SigLipTokenizer):
        cleaned = [canonicalize_text(basic_clean(text)) for text in texts]
    else:
        cleaned = [tokenizer.clean_fn(text) for text in texts]
    bare = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # which adds three special tokens of its own
    encoded = tokenizer.tokenizer(cleaned, add_special_tokens=not bare, padding=False, truncation=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]], 3 if bare else 0
