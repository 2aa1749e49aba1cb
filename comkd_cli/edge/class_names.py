"""Class names as prompts and classes.txt have them."""

from __future__ import annotations

import unicodedata

MOST_NAME_CHARACTERS = 1000  # a text encoder reads about 300 at most
JOINERS = "\u200c\u200d"  # invisible, and part of the spelling of Persian, Hindi and of emoji


def clean_class_name(name: str) -> str:
    """A class name for prompts and classes.txt: underscores become spaces, white space is collapsed, NFC is applied.

    The result is one line of visible characters. Raises ValueError, whose text completes "class 2 ...", if the name is
    empty, is not UTF-8, is longer than MOST_NAME_CHARACTERS, or contains a line break or another invisible character.
    """
    text = unicodedata.normalize("NFC", name.replace("_", " ")).strip()
    if not text.strip(JOINERS):
        raise ValueError("is empty")
    if len(text) > MOST_NAME_CHARACTERS:
        raise ValueError(f"has {len(text):,} characters, more than {MOST_NAME_CHARACTERS:,}")
    if len(text.splitlines()) > 1:
        raise ValueError("has a line break within it")
    text = " ".join(text.split())
    for character in text:
        category = unicodedata.category(character)
        if category == "Cs":
            raise ValueError("is not UTF-8")
        if category in ("Cc", "Cf") and character not in JOINERS:
            raise ValueError(f"contains the invisible character U+{ord(character):04X}")
    return text
