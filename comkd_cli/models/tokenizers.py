"""Tokenizers of CLIPs, as open_clip, transformers or the tokenizers library have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, basic_clean, canonicalize_text
from torch import Tensor

from comkd_cli.edge.json_tokenizer import CLEANING, TokenizerRules
from comkd_cli.errors import ModelError
from comkd_cli.models.architectures import (
    ALLOW_DOWNLOAD,
    LOCAL_DIR,
    architecture_name,
    check_folder,
    download_refusal,
    download_source,
    read_config,
)
from comkd_cli.models.clip import Clip
from comkd_cli.models.json_tokenizers import (
    HostTokenizer,
    NamedTokenizer,
    NeedsTransformers,
    definition_of,
    read_named_tokenizer,
)
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
        remedy = ALLOW_DOWNLOAD if refusal else _library_to_install(error)
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
    if isinstance(tokenizer, HostTokenizer):
        return [tokenizer.cut(text) for text in texts]
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
            f"the tokenizer of {clip.origin.architecture} is not CLIP's own, the only one that can be pruned",
            remedy="use the teacher's whole text encoder: comkd export --text",
        )
    return "".join(f"{first} {second}\n" for first, second in clip.tokenize.bpe_ranks)


def has_bpe_merges(clip: Clip) -> bool:
    """Whether the tokenizer is CLIP's own, whose data are its merges."""
    return isinstance(clip.tokenize, open_clip.SimpleTokenizer)


def json_definition(clip: Clip) -> tuple[str, TokenizerRules]:
    """The tokenizer as the content of a tokenizer.json, and what is done before and after it. Raises ModelError."""
    found = definition_of(clip.tokenize)
    if found is None:
        raise ModelError(
            f"the tokenizer of {clip.origin.architecture} cannot be written as a tokenizer.json",
            remedy="export without --text",
        )
    return found


def _load(model: Model) -> Callable[[Sequence[str]], Tensor]:
    found: Callable[[Sequence[str]], Tensor]
    text = _text_config(model)
    settings = _checked_settings(text)
    if (named := _named(model, text, settings)) is not None and find_spec("transformers") is None:
        return read_named_tokenizer(named)
    if model.arch is not None:
        found = open_clip.get_tokenizer(model.arch)
        return found
    length = int(text.get("context_length", 77))
    if text.get("hf_tokenizer_name"):
        mode = text.get("tokenizer_mode")
        found = HFTokenizer(text["hf_tokenizer_name"], context_length=length, tokenizer_mode=mode, **settings)
        return found
    return _clip_tokenizer(length, **settings)


@cache
def _clip_tokenizer(context: int, **settings: Any) -> Callable[[Sequence[str]], Tensor]:
    """CLIP's own, the same object for the same settings: its vocabulary takes a tenth of a second to read."""
    found: Callable[[Sequence[str]], Tensor] = open_clip.SimpleTokenizer(context_length=context, **settings)
    return found


def _library_to_install(error: Exception) -> str | None:
    """The remedy for a tokenizer that needs another library; None for other errors."""
    if isinstance(error, ImportError) and error.name == "tokenizers":
        return "pip install tokenizers"
    return "pip install transformers" if isinstance(error, ImportError | NeedsTransformers) else None


def _text_config(model: Model) -> dict[str, Any]:
    """The text_cfg of a model. Raises KeyError for a config without one."""
    if model.arch is None:
        return dict((model.config or {})["text_cfg"])
    if model.arch.startswith(SCHEMES):  # open_clip guesses if a repository has no config
        return dict(read_config(model.arch)["model_cfg"].get("text_cfg", {}))
    return dict((open_clip.get_model_config(model.arch) or {}).get("text_cfg", {}))


def _named(model: Model, text: Mapping[str, Any], settings: Mapping[str, Any]) -> NamedTokenizer | None:
    """The tokenizer that a text_cfg names; None if there is none, and for one that needs more than its file."""
    name = text.get("hf_tokenizer_name")
    special = text.get("tokenizer_mode") or settings.get("language") or text.get("hf_model_name")
    if not name or special or settings.get("clean", "whitespace") not in CLEANING:
        return None
    if model.arch is not None and model.arch.startswith(LOCAL_DIR):  # open_clip also uses the folder's own
        name = model.arch.removeprefix(LOCAL_DIR)
    return NamedTokenizer(
        str(name),
        int(text.get("context_length", 77)),
        str(settings.get("clean", "whitespace")),
        bool(settings.get("strip_sep_token", False)),
    )


def _download_source(model: Model) -> str | None:
    """What the tokenizer is downloaded from, as `download_source`."""
    if model.arch is not None and model.arch.startswith(SCHEMES):
        return download_source(model)
    config = model.config if model.arch is None else open_clip.get_model_config(model.arch)
    named = ((config or {}).get("text_cfg") or {}).get("hf_tokenizer_name")
    if model.arch is None:
        return f"{named} (hf_tokenizer_name)" if named else download_source(model)
    return str(named or f"the vocabulary of {model.arch}")


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
