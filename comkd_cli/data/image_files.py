"""Which files of a folder, a zip file or a tar are images, where they lie, and the summary of the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from PIL import features

from comkd_cli.errors import DataError

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
    # Pillow has it since 11.3, where it was built with libavif.
    | ({".avif"} if "avif" in features.modules and features.check("avif") else set())
)
"""In lower case; those of files may be in any case."""

# Files and folders that systems and tools create. So are names that begin with a dot.
JUNK = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    }
)
MOST_SUFFIXES = 8


def is_junk(name: str) -> bool:
    """Whether a file or folder name is hidden, or one that a system leaves behind: neither a class nor an image."""
    return name.startswith(".") or name.casefold() in JUNK


def below_junk(path: str) -> bool:
    """Whether any part of a path within an archive is junk; `.` and `..` are not."""
    return any(is_junk(part) for part in path.split("/") if part not in (".", ".."))


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, such as `.jpg`; empty where it has none."""
    stem, _, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if stem and suffix else ""


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return suffix_of(name) in SUFFIXES and not is_junk(name)


def skipped_text(skipped: Mapping[str, int], what: str = "file") -> str:
    """A summary of skipped files, such as "12 files of other types are skipped: 10 .heic, 2 .txt". Empty for none.

    skipped: their number, by suffix. what: the word for one of them.
    """
    total = sum(skipped.values())
    if not total:
        return ""
    ranked = sorted(skipped.items(), key=lambda pair: (-pair[1], not pair[0], pair[0]))
    counts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in ranked[:MOST_SUFFIXES]]
    if rest := ranked[MOST_SUFFIXES:]:
        counts.append(f"{sum(count for _, count in rest):,} of {len(rest)} other types")
    files = f"1 {what} of another type is" if total == 1 else f"{total:,} {what}s of other types are"
    return f"{files} skipped: {', '.join(counts)}"


def find_images(folder: Path, skipped: Counter[str] | None = None, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Every image file anywhere below a folder, in a fixed order; links are followed, hidden and junk names skipped.

    skipped: other files are counted in it, by suffix. above: folders that the folder lies in, for links that lead
    back up to them. Raises DataError for a folder that cannot be listed.
    """
    seen = {os.path.realpath(path) for path in above}
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_junk(name))
        for name in sorted(names):
            if is_image(name):
                yield Path(parent) / name
            elif skipped is not None and not is_junk(name):
                skipped[suffix_of(name)] += 1


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
    """What a folder holds, by name. Raises DataError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    """A folder that could not be listed would silently make the dataset smaller."""
    raise DataError("could not be read", path=error.filename, found=error.strerror) from error
