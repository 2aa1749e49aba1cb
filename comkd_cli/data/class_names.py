"""Class names: one rule for all of them, whether from a recipe, a text file, a folder or a split file."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comkd_cli.edge.class_names import clean_class_name
from comkd_cli.errors import DataError

MOST_SHOWN = 100  # characters of a name in an error


def clean_class_names(names: Sequence[str], origin: Path | str, lines: Sequence[int] | None = None) -> list[str]:
    """Class names as prompts use them (`edge.class_names.clean_class_name`), in the same order.

    origin: the file that holds them, as a Path, or the field. lines: where in a file each name is; None counts the
    classes from 1. Raises DataError for a name that cannot be used, for the same name twice, and for fewer than two
    names.
    """
    unit, numbers = ("class", range(1, len(names) + 1)) if lines is None else ("line", lines)
    cleaned = [clean_name(name, origin, f"{unit} {number}") for name, number in zip(names, numbers, strict=True)]
    positions: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(cleaned):
        positions[class_key(name)].append(position)
    if repeated := [where for where in positions.values() if len(where) > 1]:
        raise DataError(
            "repeats class names",
            **_place(origin),
            found="; ".join(f"{cleaned[w[0]]!r} at {' and '.join(str(numbers[i]) for i in w)}" for w in repeated),
            remedy="list each class once",
        )
    check_class_count(len(cleaned), origin)
    return cleaned


def clean_name(name: str, origin: Path | str, position: str) -> str:
    """One class name as prompts use it. position: of the name in its origin. Raises DataError."""
    try:
        return clean_class_name(name)
    except ValueError as error:
        raise DataError(
            str(error),
            **_place(origin, position),
            found=repr(name if len(name) <= MOST_SHOWN else f"{name[:MOST_SHOWN]}..."),
            remedy="use a name that is one line of visible text",
        ) from error


def check_class_count(count: int, origin: Path | str) -> None:
    """Raise DataError for fewer than two classes."""
    if count < 2:
        raise DataError("too few classes", **_place(origin), found=count, allowed="at least 2")


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file, one a line; empty lines are skipped.

    Raises DataError, also for a line that starts with `#`: as a class, a comment would change every score unnoticed.
    """
    try:
        # Not str.splitlines, which also splits at characters that an editor shows within a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the class list could not be read", path=path, found=str(error)) from error
    named = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in named:
        if line.lstrip().startswith("#"):
            raise DataError(
                "looks like a comment, and every line of a class list is a class",
                **_place(path, f"line {number}"),
                found=repr(line.strip()),
                remedy="remove the line; if the class has that name, list the classes in the recipe (data.classes)",
            )
    return clean_class_names([line for _, line in named], path, [number for number, _ in named])


def _place(origin: Path | str, position: str | None = None) -> dict[str, Any]:
    """The fields of an error that say where a class name comes from."""
    if isinstance(origin, Path):
        return {"path": origin, "field": position}
    return {"field": origin if position is None else f"{origin}: {position}"}


def class_key(name: str) -> str:
    """A key that all spellings of one class share: without case, underscores, extra white space, composed accents.

    Takes any text, so that names stored by older versions can be compared with current ones.
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()


def missing_text(names: Sequence[str], labels: Mapping[str, Sequence[int] | None]) -> str:
    """Which classes have no images, such as "no test images of: fox". Empty if each has some in every split.

    names: of the labels, in their order. labels: of the images of each split, by the split's name in messages; splits
    without labels or images do not count.
    """
    found = []
    for split, split_labels in labels.items():
        present = set(split_labels or ())
        if present and (absent := [name for label, name in enumerate(names) if label not in present]):
            mean = f" (the mean per class is over {len(present):,} of {len(names):,})" if split == "test" else ""
            found.append(f"no {split} images of: {some(absent)}{mean}")
    return "; ".join(found)


def some(names: Sequence[str], most: int = 5) -> str:
    """Up to `most` names for a message, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
