"""Checks a dataset of the suite: its lists, its counts, and every image that the lists name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from comkd_cli.data.class_names import missing_text, some
from comkd_cli.data.split_files import read_splits
from comkd_cli.data.splits import Splits, select_half
from comkd_cli.edge.images import UnreadableImage, open_image, transpose_of
from comkd_cli.errors import DataError
from comkd_cli.recipe.catalog import Dataset

MOST_NAMED = 3
KINDS = {
    "oriented_images": "images with an EXIF orientation",
    "transparent_images": "images with transparency",
    "sixteen_bit_images": "16-bit images",
}

State = Literal["ready", "incomplete", "missing"]


@dataclass(frozen=True)
class Check:
    """The result of checking a dataset."""

    dataset: str
    state: State
    folder: str
    classes: int
    train: int
    val: int
    test: int
    """Images that the lists name; 0 if they could not be read."""
    missing_images: int
    unreadable_images: int | None
    """None if images were not decoded."""
    problems: tuple[str, ...]
    """A line each."""
    notes: tuple[str, ...]
    """Notices that leave a dataset ready, a line each."""
    remedy: str
    """What to do; empty for a dataset that is ready."""
    oriented_images: int | None = None
    """With an EXIF orientation that turns them, and so on; None if images were not decoded. `data.images` says how
    such images are read."""
    transparent_images: int | None = None
    sixteen_bit_images: int | None = None

    def as_plain(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {**asdict(self), "problems": list(self.problems), "notes": list(self.notes)}


def check_dataset(
    dataset: Dataset, data_root: Path, deep: bool = False, tick: Callable[[int, int], None] = lambda done, total: None
) -> Check:
    """Read a dataset's lists, compare its counts with the catalogue's, and look for every image.

    deep: also decode each image. tick: called with the images looked at and their number.
    """
    folder = data_root / dataset.folder
    nothing = Check(dataset.name, "missing", str(folder), 0, 0, 0, 0, 0, None, (), (), _remedy(dataset, folder))
    if not folder.is_dir():
        return replace(nothing, problems=(f"{folder} does not exist",))
    try:
        splits = read_splits(dataset, data_root)
    except DataError as error:
        return replace(nothing, state="incomplete", problems=(str(error),))
    entries = [*splits.train, *splits.val, *splits.test]
    absent: list[str] = []
    unreadable: list[str] = []
    kinds: Counter[str] = Counter()
    for done, entry in enumerate(entries, start=1):
        path = folder / entry.path
        if not path.is_file():
            absent.append(entry.path)
        elif deep and (problem := _decoding_problem(path)):
            unreadable.append(problem)
        elif deep:
            kinds.update(_kinds_of(path))
        tick(done, len(entries))
    problems = _count_problems(dataset, splits)
    if absent:
        problems.append(f"{len(absent):,} of {len(entries):,} images are missing: {some(absent, MOST_NAMED)}")
    if unreadable:
        problems.append(f"{len(unreadable):,} images could not be decoded: {some(unreadable, MOST_NAMED)}")
    return replace(
        nothing,
        state="incomplete" if problems else "ready",
        classes=len({entry.label for entry in entries}),
        train=len(splits.train),
        val=len(splits.val),
        test=len(splits.test),
        missing_images=len(absent),
        unreadable_images=len(unreadable) if deep else None,
        problems=tuple(problems),
        notes=_notes(splits, kinds),
        remedy=nothing.remedy if problems else "",
        oriented_images=kinds["oriented_images"] if deep else None,
        transparent_images=kinds["transparent_images"] if deep else None,
        sixteen_bit_images=kinds["sixteen_bit_images"] if deep else None,
    )


def _decoding_problem(path: Path) -> str:
    """Why an image could not be decoded; empty if it could."""
    try:
        open_image(path)
    except UnreadableImage as error:
        return str(error)
    return ""


def _kinds_of(path: Path) -> list[str]:
    """Which of KINDS an image is that can be decoded; its pixels are not read again."""
    with Image.open(path) as image:
        layout = str(image.tile[0][3]) if getattr(image, "tile", None) else ""
        found = {
            "oriented_images": transpose_of(image) is not None,
            "transparent_images": image.has_transparency_data,
            "sixteen_bit_images": image.mode.startswith("I") or "16" in layout,
        }
    return [name for name, holds in found.items() if holds]


def _count_problems(dataset: Dataset, splits: Splits) -> list[str]:
    labels = {entry.label for entry in (*splits.train, *splits.val, *splits.test)}
    base, new = (len(select_half(splits, half).test) for half in ("base", "new"))
    counts = [
        ("classes", len(labels), dataset.classes),
        ("train images", len(splits.train), dataset.train),
        ("val images", len(splits.val), dataset.val),
        ("test images", len(splits.test), dataset.test),
        ("base test images", base, dataset.base_test),
        ("new test images", new, dataset.new_test),
    ]
    return [
        f"{found:,} {what} instead of the published {expected:,}"
        for what, found, expected in counts
        if expected is not None and found != expected
    ]


def _notes(splits: Splits, kinds: Mapping[str, int]) -> tuple[str, ...]:
    """The notices that opening the dataset reports: on its lists, and classes without images; images of KINDS."""
    parts = {"training": splits.train, "validation": splits.val, "test": splits.test}
    labels = {name: [entry.label for entry in entries] for name, entries in parts.items()}
    absent = missing_text(list(splits.class_names.values()), labels)
    counted = [f"{kinds[name]:,} {text}" for name, text in KINDS.items() if kinds.get(name)]
    reading = f"{', '.join(counted)}: `data.images` of a recipe determines how they are read" if counted else ""
    return tuple(filter(None, (*splits.notices, absent, reading)))


def _remedy(dataset: Dataset, folder: Path) -> str:
    if dataset.archive is not None:
        return f"`comkd datasets fetch {dataset.name}`, or prepare {folder} as CoOp's DATASETS.md describes"
    return f"put it at {folder}: {dataset.origin}"
