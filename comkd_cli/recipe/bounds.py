"""Limits of plain data that come from a file: their size, and texts that no file can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comkd_cli.errors import RecipeError

MOST_VALUES = 1_000_000
MOST_LEVELS = 100
MOST_OPEN_BRACKETS = 300


def check_plain_tree(tree: Any, name: str) -> None:
    """Raise RecipeError for plain data with too many values or levels, or with text that is not UTF-8.

    A value that YAML's aliases, or the references of a checkpoint, repeat counts as often as it occurs: a few lines of
    YAML can stand for thousands of millions of values.
    """
    count = 0
    level = [tree]
    for _ in range(MOST_LEVELS):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value, name)
            elif isinstance(value, Mapping):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            if count + len(below) > MOST_VALUES:
                raise RecipeError("holds too many values", path=name, allowed=f"{MOST_VALUES:,} at most")
        if not below:
            return
        count += len(below)
        level = below
    raise RecipeError("is nested too deeply, or without end", path=name, allowed=f"{MOST_LEVELS} levels at most")


def check_brackets(text: str, name: str) -> None:
    """Raise RecipeError for text with MOST_OPEN_BRACKETS more opened than closed: a YAML parser takes time that grows
    with the square of their number. Those within quotes also count.
    """
    opened = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        opened += 1 if bracket in "[{" else -1
        if opened > MOST_OPEN_BRACKETS:
            raise RecipeError(
                "is nested too deeply", path=name, allowed=f"{MOST_OPEN_BRACKETS} open brackets, also within quotes"
            )
        opened = max(0, opened)


def is_file(path: Path) -> bool:
    """Whether a path that a recipe names is a file; False for one that no file system accepts."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(
            "holds text that is not UTF-8", path=name, found=ascii(text), remedy="rename the file or correct the text"
        ) from error
