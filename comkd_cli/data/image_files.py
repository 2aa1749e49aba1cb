"""Which files of a folder, a zip file or a tar are images, where they lie, and the summary of the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from comkd_cli.edge.image_files import SUFFIXES, is_image, is_junk, skipped_text, suffix_of, walk_images
from comkd_cli.errors import DataError

__all__ = [
    "SUFFIXES",
    "below_junk",
    "find_images",
    "image_names",
    "is_image",
    "is_junk",
    "skipped_text",
    "subfolders_of",
    "suffix_of",
]


def below_junk(path: str) -> bool:
    """Whether any part of a path within an archive is junk; `.` and `..` are not."""
    return any(is_junk(part) for part in path.split("/") if part not in (".", ".."))


def find_images(folder: Path, skipped: Counter[str] | None = None, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Every image file anywhere below a folder, in a fixed order; links are followed, hidden and junk names skipped.

    skipped: other files are counted in it, by suffix. above: folders that the folder lies in, for links that lead
    back up to them. Raises DataError for a folder that cannot be listed.
    """
    try:
        yield from walk_images(folder, skipped, above)
    except OSError as error:
        _refuse(error)


def image_names(folder: Path, skipped: Counter[str]) -> list[str]:
    """The names of the images directly in a folder, sorted; other files are counted in `skipped`. Raises DataError."""
    images = []
    for entry in _entries(folder):
        if entry.is_dir() or is_junk(entry.name):
            continue
        if is_image(entry.name):
            images.append(entry.name)
        else:
            skipped[suffix_of(entry.name)] += 1
    return images


def subfolders_of(folder: Path) -> list[str]:
    """The names of the folders directly in a folder, sorted, without junk. Raises DataError."""
    return [entry.name for entry in _entries(folder) if entry.is_dir() and not is_junk(entry.name)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name. Raises DataError if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    """A folder that could not be listed would silently make the dataset smaller."""
    raise DataError("could not be read", path=error.filename, found=error.strerror) from error
