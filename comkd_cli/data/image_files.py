"""Which files of a folder, a zip file or a tar are images, and what is said of the others."""

from __future__ import annotations

from comkd_cli.edge.image_files import SUFFIXES, is_image, is_junk, skipped_text, suffix_of

__all__ = ["SUFFIXES", "below_junk", "is_image", "is_junk", "skipped_text", "suffix_of"]


def below_junk(path: str) -> bool:
    """Whether any part of a path within an archive is junk; `.` and `..` are not."""
    return any(is_junk(part) for part in path.split("/") if part not in (".", ".."))
