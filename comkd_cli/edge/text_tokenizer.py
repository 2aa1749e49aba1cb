"""The tokenizer of a bundle's text encoder: CLIP's, or one of the tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comkd_cli.edge.clip_tokenizer import Tokenizer
from comkd_cli.edge.json_tokenizer import JsonTokenizer, TokenizerRules
from comkd_cli.edge.manifest import BundleProblem, read_array, verified_bytes


def read_tokenizer(folder: Path, manifest: dict[str, Any], text: Mapping[str, Any]) -> Tokenizer | JsonTokenizer:
    """The tokenizer of a bundle. text: the manifest's entry of the text encoder.

    Raises BundleProblem, also if the tokenizers library is needed and not installed; KeyError, TypeError,
    ValueError or AttributeError for a damaged entry.
    """
    length, entry = int(text["context_length"]), text.get("tokenizer")
    if entry is None:
        merges = verified_bytes(folder, manifest, text["merges"]).decode("utf-8")
        name = text.get("vocabulary")
        vocabulary = None if name is None else [int(token) for token in read_array(folder, manifest, name)]
        return Tokenizer(merges, length, vocabulary)
    definition = verified_bytes(folder, manifest, entry["file"]).decode("utf-8")
    rules = TokenizerRules(
        str(entry["clean"]),
        int(entry["pad"]),
        bool(entry["pad_left"]),
        None if entry["zeroed"] is None else int(entry["zeroed"]),
    )
    try:
        return JsonTokenizer(definition, length, rules)
    except ImportError as error:
        raise BundleProblem(
            f"adding classes to this bundle needs the tokenizers library, which could not be imported: {error}",
            path=folder / "manifest.json",
            field="text.tokenizer",
            remedy="pip install tokenizers",
        ) from error
