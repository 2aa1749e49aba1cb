"""Class names: one rule for all of them, whether from a recipe, a text file, a folder or a split file."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from comkd_cli.edge.class_names import clean_class_name
from comkd_cli.errors import DataError


def clean_class_names(names: Sequence[str], origin: str, lines: Sequence[int] | None = None) -> list[str]:
    """Class names as prompts have them (`edge.class_names.clean_class_name`), in the same order.

    origin: the file or the field that holds them, for messages. lines: where in a file each name is; None counts the
    classes from 1. Raises DataError for a name that cannot be used, for the same name twice, and for fewer than two
    names.
    """
    unit, numbers = ("class", range(1, len(names) + 1)) if lines is None else ("line", lines)
    cleaned = [clean_name(name, origin, f"{unit} {number}") for name, number in zip(names, numbers, strict=True)]
    positions: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(cleaned):
        positions[class_key(name)].append(position)
    if repeated := [where for where in positions.values() if len(where) > 1]:
        told = "; ".join(f"{cleaned[w[0]]!r} at {' and '.join(str(numbers[i]) for i in w)}" for w in repeated)
        raise DataError(f"{origin}: the class list repeats {told}; list each class once")
    if len(cleaned) < 2:
        raise DataError(f"{origin}: there must be at least 2 classes to tell apart, not {len(cleaned)}")
    return cleaned


def clean_name(name: str, origin: str, place: str) -> str:
    """One class name as prompts have it. Raises DataError, naming the file and the place in it."""
    try:
        return clean_class_name(name)
    except ValueError as error:
        raise DataError(f"{origin}: {place} {error}: {name!r}; give it a name of one line of visible text") from error


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file, one a line; empty lines are skipped. Raises DataError."""
    try:
        # Not str.splitlines, which also splits at characters that an editor shows within a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the class list can't be read: {error}") from error
    named = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return clean_class_names([line for _, line in named], str(path), [number for number, _ in named])


def class_key(name: str) -> str:
    """What all spellings of one class share: case, underscores for spaces, white space, composed accents.

    Takes any text, so that names stored by older versions can be compared with those of today.
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()


def missing_text(names: Sequence[str], labels: Mapping[str, Sequence[int] | None]) -> str:
    """Which classes have no images, such as "no test images of: fox". Empty where each has some in every split.

    names: of the labels, in their order. labels: of each split's images, by what messages call its images; splits
    without labels or images do not count.
    """
    told = []
    for split, found in labels.items():
        present = set(found or ())
        if present and (absent := [name for label, name in enumerate(names) if label not in present]):
            mean = f" (the mean per class is over {len(present):,} of {len(names):,})" if split == "test" else ""
            told.append(f"no {split} images of: {some(absent)}{mean}")
    return "; ".join(told)


def some(names: Sequence[str], most: int = 5) -> str:
    """Up to `most` names for a message, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
