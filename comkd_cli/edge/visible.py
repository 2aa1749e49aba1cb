"""Text of unknown origin on a terminal: what would move the cursor, hide or reorder text is written as an escape.

Needs nothing; it becomes a part of every bundle's predict.py.
"""

from __future__ import annotations

LINE_BREAK, TAB = "\n", "\t"
# C0, DEL and C1, with which terminal escapes begin; marks, embeddings and isolates of direction; line separators.
INVISIBLE = (*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in INVISIBLE if chr(code) not in LINE_BREAK + TAB}


def visible(text: str, one_line: bool = False) -> str:
    r"""The text with control characters as Python writes them, such as `\x1b`.

    Line breaks and tabs stay, unless it should be `one_line`. Joiners stay, which are part of words.
    """
    shown = text.translate(ESCAPES)
    return shown.replace(LINE_BREAK, "\\n").replace(TAB, "\\t") if one_line else shown
