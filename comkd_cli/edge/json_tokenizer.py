"""Tokenizers of text encoders other than CLIP's, such as SigLIP's: a tokenizer.json, read by the tokenizers library.

open_clip cleans a text and lets transformers tokenize it, which uses the same library. Texts are cleaned here with the
differences that clip_tokenizer.py names.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comkd_cli.edge.clip_tokenizer import fixed_text

MOST_CONTEXT = 2**16
MOST_TOKENS = 2**31
NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


def in_one_line(text: str) -> str:
    """A text with characters fixed and single spaces."""
    return " ".join(fixed_text(text).split())


def in_lower_case(text: str) -> str:
    """`in_one_line` in lower case."""
    return in_one_line(text).lower()


def canonical(text: str) -> str:
    """`in_lower_case` without ASCII punctuation, as big_vision prepares the texts of SigLIP; `_` is a space."""
    plain = fixed_text(text).replace("_", " ").translate(NO_PUNCTUATION)
    return " ".join(plain.lower().split())


CLEANING = {"whitespace": in_one_line, "lower": in_lower_case, "canonicalize": canonical}
"""By open_clip's names."""


@dataclass(frozen=True)
class TokenizerRules:
    """What open_clip and transformers do before and after the library's own work.

    Raises ValueError for values that no tokenizer has.
    """

    clean: str
    """How texts are cleaned, a key of CLEANING."""
    pad: int
    """The token that fills a row."""
    pad_left: bool = False
    """Fill rows from the left."""
    zeroed: int | None = None
    """A token that is replaced by 0 (`strip_sep_token` of open_clip); None: no token."""

    def __post_init__(self) -> None:
        """Check the values, which may come from a damaged manifest."""
        if self.clean not in CLEANING:
            raise ValueError(f"texts cannot be cleaned by {self.clean!r} (allowed: {', '.join(CLEANING)})")
        for token in (self.pad, self.zeroed or 0):
            if not 0 <= token < MOST_TOKENS:
                raise ValueError(f"no token is {token}")


def read_definition(definition: str) -> Any:
    """A tokenizer of the library that neither pads nor truncates, from the content of a tokenizer.json.

    Raises ImportError without the library, ValueError for a content that it does not read.
    """
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokenizers {tokenizers.__version__} does not read the tokenizer.json: {error}") from error
    found.no_padding()
    found.no_truncation()
    return found


class JsonTokenizer:
    """Tokenizes texts by a tokenizer.json.

    definition: the content of the file. context_length: tokens of a text, including those that the tokenizer adds.
    Raises ImportError without the tokenizers library, ValueError for a definition that it does not read and for an
    impossible context_length.
    """

    def __init__(self, definition: str, context_length: int, rules: TokenizerRules) -> None:
        if not 1 <= context_length <= MOST_CONTEXT:
            raise ValueError(f"context_length must be 1 to {MOST_CONTEXT}, not {context_length}")
        self._library = read_definition(definition)
        self.context_length = context_length
        self._rules = rules
        self._clean = CLEANING[rules.clean]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The tokens of each text, int64 (len(texts), context_length).

        A longer text is truncated; tokens that the tokenizer adds, such as an end, are kept. A single text is a batch
        of one.
        """
        if isinstance(texts, str):
            texts = [texts]
        self._library.enable_truncation(self.context_length)
        tokens = np.full((len(texts), self.context_length), self._rules.pad, dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._library.encode(self._clean(text)).ids
            start = len(row) - len(ids) if self._rules.pad_left else 0
            row[start : start + len(ids)] = ids
        if self._rules.zeroed is not None:
            tokens[tokens == self._rules.zeroed] = 0
        return tokens

    def length(self, text: str) -> int:
        """The number of tokens of a text that is not truncated, including those that the tokenizer adds."""
        self._library.no_truncation()
        return len(self._library.encode(self._clean(text)).ids)

    def cut(self, text: str) -> int:
        """The number of tokens by which a text exceeds the context; 0 if it fits."""
        return max(0, self.length(text) - self.context_length)
