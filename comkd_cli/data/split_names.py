"""The names of a folder's splits, and folders that look like splits under other names or in other places."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from comkd_cli.data.image_files import find_images
from comkd_cli.errors import DataError

SPLITS = ("train", "val", "test")

# Other common names of the splits, and the name that comkd uses.
OTHER_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tests", "holdout"), "test"),
}
# Parts of such names that do not say which split it is, as in train2017, val_images and test-data.
SPLIT_NAME_EXTRA = re.compile(r"[\W\d_]+|dataset|data|images?|imgs?|jpe?g|png|sets?|splits?")


def check_split_names(folder: Path, subfolders: Sequence[str]) -> None:
    """Refuse a folder whose splits have other names: they would be treated as unlabelled images."""
    for name in subfolders:
        meant = split_meant(name)
        if meant and name not in SPLITS and any(find_images(folder / name)):
            raise DataError(
                "looks like a split with another name",
                path=folder / name,
                allowed=SPLITS,
                remedy=f"rename it to {meant}, or move it out of the folder",
            )


def split_meant(name: str) -> str | None:
    """The split that a folder's name means, in any spelling; None for other names."""
    return OTHER_SPLIT_NAMES.get(SPLIT_NAME_EXTRA.sub("", name.casefold()))


def check_splits_further_down(folder: Path, keys: Sequence[str]) -> None:
    """Refuse unlabelled images in splits one or more folders further down: test images would be trained on."""
    inside: dict[PurePosixPath, dict[str, str]] = defaultdict(dict)
    for parent in {PurePosixPath(key).parent for key in keys}:
        for place in (parent, *parent.parents):
            if meant := split_meant(place.name):
                inside[place.parent].setdefault(meant, place.name)
    for place, found in sorted(inside.items()):
        if "train" in found and len(found) > 1:
            names = ", ".join(found[split] for split in SPLITS if split in found)
            raise DataError(
                "contains folders that look like splits, and all would be trained on",
                path=folder / place,
                found=names,
                remedy=f"use this folder as `data.folder`, or move them out of {folder}",
            )
