"""Which files of a folder, a zip file or a tar are images, and the summary of the others."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import features

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
