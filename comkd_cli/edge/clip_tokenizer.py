"""CLIP's byte-pair tokenizer on numpy and the standard library: open_clip's SimpleTokenizer, token for token.

open_clip cleans a text with ftfy before it splits it. The same characters are fixed here, with three differences:

- Mojibake, text that was once decoded with the wrong encoding (`schÃ¶n`), is kept; ftfy guesses the original.
- Python's Unicode data decide which code points are letters, numbers or neither; code points of a later version of
  Unicode may be split from their neighbours differently.
- A line is cleaned as a whole; ftfy splits one of more than a million characters.
"""

from __future__ import annotations

import functools
import html
import html.entities
import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

START_OF_TEXT, END_OF_TEXT = "<start_of_text>", "<end_of_text>"
END_OF_WORD = "</w>"
VOCABULARY_SIZE = 49_408
BYTE_TOKENS = range(2 * 256)  # every byte has a token within words and one that ends them
MERGES = VOCABULARY_SIZE - len(BYTE_TOKENS) - 2
START, END = VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1  # the tokens of both
CACHED_WORDS = 65_536

# --- cleaning --------------------------------------------------------------------------------------------

LIGATURES = {
    "Ĳ": "IJ",
    "ĳ": "ij",
    "ŉ": "'n",
    "Ǆ": "DŽ",
    "ǅ": "Dž",
    "ǆ": "dž",
    "Ǉ": "LJ",
    "ǈ": "Lj",
    "ǉ": "lj",
    "Ǌ": "NJ",
    "ǋ": "Nj",
    "ǌ": "nj",
    "Ǳ": "DZ",
    "ǲ": "Dz",
    "ǳ": "dz",
    "\ufb00": "ff",
    "\ufb01": "fi",
    "\ufb02": "fl",
    "\ufb03": "ffi",
    "\ufb04": "ffl",
    "\ufb05": "\u017ft",  # the long s stays: it is not a ligature
    "\ufb06": "st",
}
SINGLE_QUOTES = "\u02bc\u2018\u2019\u201a\u201b"
DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f"
HALFWIDTH_AND_FULLWIDTH_FORMS = range(0xFF01, 0xFFF0)
C1_CONTROLS = range(0x80, 0xA0)
# Applied until nothing changes, so what a substitute contains is replaced too: U+0091 becomes a curly quote,
# then a straight one.
SUBSTITUTES = str.maketrans(
    LIGATURES
    | dict.fromkeys(SINGLE_QUOTES, "'")
    | dict.fromkeys(DOUBLE_QUOTES, '"')
    | {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in HALFWIDTH_AND_FULLWIDTH_FORMS}
    # If Windows-1252 has no character either, the control stays.
    | {chr(code): bytes([code]).decode("cp1252", "ignore") or chr(code) for code in C1_CONTROLS}
)
# ASCII controls but for tab, line feed, form feed and carriage return; deprecated formatting; U+FEFF, the
# byte order mark; interlinear annotation and the object replacement character.
REMOVED = dict.fromkeys(
    [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
)
TERMINAL_ESCAPE = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
ENTITY = re.compile(r"&(#?[0-9A-Za-z]{1,24};)")


def entity_text(entity: re.Match[str]) -> str:
    """The text of an HTML entity that matches ENTITY; the entity itself if it is ambiguous."""
    name = entity[1]
    if name in html.entities.html5:
        return html.entities.html5[name]
    unescaped = html.unescape(entity[0])
    if name.startswith("#"):
        return entity[0] if ";" in unescaped else unescaped
    # P&EACUTE;REZ: an entity only in lower case.
    if unescaped == entity[0] and name == name.upper() and name.lower() in html.entities.html5:
        return html.entities.html5[name.lower()].upper()
    return entity[0]


def fix_characters(line: str, unescape: bool) -> str:
    """A line with plain quotes and letters, composed (NFC), and without controls and terminal escapes.

    unescape: whether HTML entities become their characters.
    """
    while True:
        before = line
        if unescape:
            line = ENTITY.sub(entity_text, line)
        line = line.translate(SUBSTITUTES)
        # Surrogates in pairs become characters, those alone U+FFFD.
        line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        line = TERMINAL_ESCAPE.sub("", line).translate(REMOVED)
        line = unicodedata.normalize("NFC", line)
        if line == before:
            return line


def fixed_text(text: str) -> str:
    """A text with characters fixed and entities replaced, as by open_clip's `basic_clean`, but not stripped."""
    unescape, lines = True, []
    for line in text.split("\n"):
        # ftfy treats a text as HTML from the first < on, and keeps its entities. Those are replaced below, where curly
        # quotes are kept.
        unescape = unescape and "<" not in line
        lines.append(fix_characters(line, unescape))
    return html.unescape(html.unescape("\n".join(lines)))


def clean(text: str) -> str:
    """`fixed_text` in lower case; white space is not collapsed."""
    return fixed_text(text).lower()


# --- splitting -------------------------------------------------------------------------------------------

# In lower case. The pattern that this follows ignores case, by which the long s, itself in lower case, is an s.
PIECE = re.compile(
    r"<[s\u017f]tart_of_text>|<end_of_text>"
    r"|'(?:[s\u017ftmd]|re|ve|ll)"
    r"|(?P<letters_and_numbers>[^\W_]+)"
    r"|[\W_]+"
)
# Not a letter, but its uppercase is one: ignoring case, it matches neither the pattern's letters nor the complement of
# letters, numbers and space.
COMBINING_GREEK_YPOGEGRAMMENI = "\u0345"


def split_words(text: str) -> list[str]:
    """The parts of a cleaned text that are tokenized independently."""
    return text.replace(COMBINING_GREEK_YPOGEGRAMMENI, " ").split()


def split_pieces(word: str) -> Iterator[str]:
    """The parts of a word that merges do not cross: runs of letters, single digits, runs of other characters."""
    for piece in PIECE.finditer(word):
        run = piece["letters_and_numbers"]
        if run is None or run.isalpha():
            yield piece[0]
            continue
        for is_letters, characters in itertools.groupby(run, str.isalpha):
            if is_letters:
                yield "".join(characters)
            else:
                yield from characters


# --- byte-pair encoding ----------------------------------------------------------------------------------


def byte_symbols() -> dict[int, str]:
    """The character of each byte in the merges, in the order of the tokens of bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """Tokenizes texts for CLIP's text encoders.

    merges: the merges of CLIP's vocabulary, a pair of symbols per line, in order. context_length: tokens of a text,
    including start and end. vocabulary: the tokens that a pruned encoder has, among them all of BYTE_TOKENS, START and
    END. Its tokens count from 1 in the order of the vocabulary, and 0 is padding; a token that it lacks becomes the two
    that it was merged from, and those in turn. None: CLIP's own tokens. Raises ValueError if the number of merges is
    not that of CLIP's vocabulary, if context_length is below 1, or if the vocabulary lacks a token that it needs.
    """

    def __init__(self, merges: str, context_length: int, vocabulary: Sequence[int] | None = None) -> None:
        pairs = [line.split() for line in merges.splitlines()]
        if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"merges must be {MERGES} lines of two symbols each")
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, not {context_length}")
        self.context_length = context_length
        self._byte_symbols = byte_symbols()
        self._ranks = {(first, second): rank for rank, (first, second) in enumerate(pairs)}
        within = list(self._byte_symbols.values())
        ending = [symbol + END_OF_WORD for symbol in within]
        symbols = [*within, *ending, *map("".join, pairs), START_OF_TEXT, END_OF_TEXT]
        self._ids = {symbol: token for token, symbol in enumerate(symbols)}
        self._parts = [(self._ids[first], self._ids[second]) for first, second in pairs]
        self._pruned: dict[int, int] | None = None
        if vocabulary is not None:
            self._pruned = {int(token): position for position, token in enumerate(vocabulary, start=1)}
            if not {*BYTE_TOKENS, START, END} <= set(self._pruned):
                raise ValueError("the vocabulary lacks the tokens of bytes, of the start or of the end")
        self._cached_word_ids = functools.lru_cache(CACHED_WORDS)(self._word_ids)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The tokens of each text, int64 (len(texts), context_length), with zeros after the end token.

        A longer text is truncated and ends with the end token. A single text is a batch of one.
        """
        if isinstance(texts, str):
            texts = [texts]
        tokens = np.zeros((len(texts), self.context_length), dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [*self.known(START), *self.encode(text), *self.known(END)]
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], *self.known(END)]
            row[: len(ids)] = ids
        return tokens

    def encode(self, text: str) -> list[int]:
        """All tokens of a text, without start and end."""
        return [known for token in self.clip_tokens(text) for known in self.known(token)]

    def clip_tokens(self, text: str) -> list[int]:
        """CLIP's own tokens of a text, whatever the vocabulary, without start and end."""
        return [token for word in split_words(clean(text)) for token in self._cached_word_ids(word)]

    def cut(self, text: str) -> int:
        """The number of tokens by which a text exceeds the context; 0 if it fits."""
        return max(0, len(self.encode(text)) + 2 - self.context_length)

    def split(self, token: int) -> tuple[int, ...]:
        """The two tokens that one of CLIP's tokens was merged from; the token itself if it was not merged."""
        return self._parts[token - len(BYTE_TOKENS)] if len(BYTE_TOKENS) <= token < START else (token,)

    def known(self, token: int) -> tuple[int, ...]:
        """The encoder's own tokens for one of CLIP's: itself, or those that it was merged from."""
        if self._pruned is None:
            return (token,)
        if token in self._pruned:
            return (self._pruned[token],)
        first, second = self.split(token)
        return (*self.known(first), *self.known(second))

    def _word_ids(self, word: str) -> tuple[int, ...]:
        return tuple(self._ids[symbol] for piece in split_pieces(word) for symbol in self._merged(piece))

    def _merged(self, piece: str) -> list[str]:
        """The symbols of a piece after all merges, applied in order of rank."""
        if piece in (START_OF_TEXT, END_OF_TEXT):
            return [piece]
        symbols = [self._byte_symbols[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += END_OF_WORD
        while len(symbols) > 1:
            pair = min(itertools.pairwise(symbols), key=lambda pair: self._ranks.get(pair, math.inf))
            if pair not in self._ranks:
                break
            merged = symbols[:1]
            for symbol in symbols[1:]:
                if (merged[-1], symbol) == pair:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        return symbols
