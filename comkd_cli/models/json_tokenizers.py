"""Tokenizers that a config names by `hf_tokenizer_name`: their tokenizer.json, read without transformers.

open_clip needs transformers for them, which reads the same file by the same library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, get_clean_fn
from torch import Tensor

from comkd_cli.edge.json_tokenizer import CLEANING, JsonTokenizer, TokenizerRules, read_definition

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Of these classes transformers pads rows on the right unless a tokenizer_config.json says otherwise.
PADDED_RIGHT = ("T5Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")


class NeedsTransformers(ValueError):
    """A tokenizer whose files do not state everything that transformers would do."""


@dataclass(frozen=True)
class NamedTokenizer:
    """The settings of a text_cfg that concern its tokenizer."""

    name: str
    """A folder, or a repository of the Hugging Face Hub."""
    context_length: int
    clean: str = "whitespace"
    strip_sep_token: bool = False


class HostTokenizer:
    """A tokenizer.json as open_clip's tokenizers are called. Raises as `JsonTokenizer`."""

    def __init__(self, definition: str, context_length: int, rules: TokenizerRules) -> None:
        self.definition, self.context_length, self.rules = definition, context_length, rules
        self._tokenizer = JsonTokenizer(definition, context_length, rules)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (texts, context)."""
        return torch.from_numpy(self._tokenizer(texts))

    def cut(self, text: str) -> int:
        """The number of tokens by which a text exceeds the context; 0 if it fits."""
        return self._tokenizer.cut(text)


def read_named_tokenizer(named: NamedTokenizer) -> HostTokenizer:
    """The tokenizer of a folder, or of a repository, from the cache or by a download.

    Raises ImportError without the tokenizers library, NeedsTransformers for files that do not say enough, ValueError
    for a damaged one, and the errors of the Hub's client.
    """
    import_module("tokenizers")  # before anything is downloaded
    definition = _file(named.name, TOKENIZER).read_text(encoding="utf-8")
    settings = json.loads(_file(named.name, SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise NeedsTransformers(f"{SETTINGS} should be a mapping of fields")
    tokens = _Tokens(definition, settings)
    rules = TokenizerRules(
        clean=named.clean,
        pad=tokens.required("pad_token"),
        pad_left=_pads_left(settings),
        zeroed=tokens.required("sep_token") if named.strip_sep_token else None,
    )
    tokens.check_ends()
    return HostTokenizer(definition, named.context_length, rules)


def definition_of(tokenizer: object) -> tuple[str, TokenizerRules] | None:
    """The tokenizer.json and the rules of a tokenizer; None for one that these do not describe.

    tokenizer: a HostTokenizer, or one of open_clip's around a fast one of transformers.
    """
    if isinstance(tokenizer, HostTokenizer):
        return tokenizer.definition, tokenizer.rules
    own: Any = tokenizer
    if not isinstance(own, HFTokenizer | SigLipTokenizer) or not hasattr(own.tokenizer, "backend_tokenizer"):
        return None
    theirs: Any = own.tokenizer
    if isinstance(own, SigLipTokenizer):
        clean, strips = "canonicalize", False
    elif own.tokenizer_mode:
        return None
    else:
        cleaning = {get_clean_fn(name): name for name in CLEANING}
        clean, strips = cleaning[own.clean_fn], own.strip_sep_token
    zeroed = int(theirs.sep_token_id) if strips else None
    rules = TokenizerRules(clean, int(theirs.pad_token_id), theirs.padding_side == "left", zeroed)
    return str(theirs.backend_tokenizer.to_str()), rules


class _Tokens:
    """The special tokens of a tokenizer, by the fields of its tokenizer_config.json."""

    def __init__(self, definition: str, settings: Mapping[str, Any]) -> None:
        self._library = read_definition(definition)
        self._settings = settings

    def required(self, field: str) -> int:
        """The id of a token. Raises NeedsTransformers if the file does not name one of the vocabulary."""
        if (found := self._id(field)) is None:
            raise NeedsTransformers(f"{SETTINGS} has no {field} that {TOKENIZER} knows")
        return found

    def check_ends(self) -> None:
        """Raise NeedsTransformers if transformers may add a start or an end token that tokenizer.json does not."""
        ids = self._library.encode("a").ids
        for field, token, found in (
            ("add_bos_token", "bos_token", ids[:1]),
            ("add_eos_token", "eos_token", ids[-1:]),
        ):
            wanted, known = self._settings.get(field), self._id(token)
            if isinstance(wanted, bool) and wanted != (known is not None and found == [known]):
                stated = str(wanted).lower()
                raise NeedsTransformers(f"{SETTINGS} has {field}: {stated}, but {TOKENIZER} does otherwise")

    def _id(self, field: str) -> int | None:
        value = self._settings.get(field)
        token = value.get("content") if isinstance(value, dict) else value
        found: int | None = self._library.token_to_id(token) if isinstance(token, str) else None
        return found


def _pads_left(settings: Mapping[str, Any]) -> bool:
    side = settings.get("padding_side")
    if side is None and str(settings.get("tokenizer_class")).startswith(PADDED_RIGHT):
        return False
    if side not in ("left", "right"):
        raise NeedsTransformers(f"{SETTINGS} does not say on which side rows are padded (padding_side)")
    return bool(side == "left")


def _file(name: str, file: str) -> Path:
    """A file of a folder or a repository. Raises NeedsTransformers if a folder lacks it."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:  # there is no network; the other one is an answer of the Hub
            raise
        except EntryNotFoundError as error:
            raise NeedsTransformers(f"{name} has no {file}") from error
    if not (folder / file).is_file():
        raise NeedsTransformers(f"{folder} has no {file}")
    return folder / file
