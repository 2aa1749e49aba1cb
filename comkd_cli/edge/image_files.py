"""Finds the image files below a folder. Needs Pillow; it becomes a part of every bundle's predict.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import features

HEIF_SUFFIXES = (".heic", ".heif")


def _register_heif() -> bool:
    """Let Pillow read HEIC and HEIF if pillow-heif is installed; returns whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


READS_HEIF = _register_heif()
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
    # Pillow has it since 11.3, if it was built with libavif.
    | ({".avif"} if "avif" in features.modules and features.check("avif") else set())
    | (set(HEIF_SUFFIXES) if READS_HEIF else set())
)
"""In lower case; a file's own may be in any case."""

# What systems and tools leave beside a user's files. Names that begin with a dot also count.
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
    """Whether a file or folder name is hidden, or one that a system leaves behind: never a class, never an image."""
    return name.startswith(".") or name.casefold() in JUNK


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, such as `.jpg`; empty if it has none."""
    stem, _, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if stem and suffix else ""


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return suffix_of(name) in SUFFIXES and not is_junk(name)


def walk_images(folder: Path, skipped: Counter[str] | None = None, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Every image file anywhere below a folder, in a fixed order; links are followed, hidden and junk names skipped.

    skipped: other files are counted in it, by suffix. above: folders that the folder lies in, for links that lead
    back up to them. Raises OSError for a folder that cannot be listed.
    """
    seen = {os.path.realpath(path) for path in above}
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_raise):
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


def skipped_text(skipped: Mapping[str, int], what: str = "file") -> str:
    """Files that are not images, such as "12 files of other types are skipped: 10 .heic, 2 .txt". Empty for none.

    skipped: their number, by suffix. what: what a message calls one of them. HEIC files are followed by what to
    install.
    """
    total = sum(skipped.values())
    if not total:
        return ""
    ranked = sorted(skipped.items(), key=lambda pair: (-pair[1], not pair[0], pair[0]))
    listed = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in ranked[:MOST_SUFFIXES]]
    if rest := ranked[MOST_SUFFIXES:]:
        listed.append(f"{sum(count for _, count in rest):,} of {len(rest)} other types")
    files = f"1 {what} of another type is" if total == 1 else f"{total:,} {what}s of other types are"
    remedy = "; to read HEIC: pip install 'comkd[heic]'" if any(map(skipped.get, HEIF_SUFFIXES)) else ""
    return f"{files} skipped: {', '.join(listed)}{remedy}"


def _raise(error: OSError) -> None:
    raise error
