"""Whether a data set of the suite is there as it must be: lists, counts, and every image that they name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from comkd_cli.data.class_names import missing_text
from comkd_cli.data.splits import Entry, Splits, read_splits, select_half
from comkd_cli.edge.images import UnreadableImage, open_image
from comkd_cli.errors import DataError
from comkd_cli.recipe.catalog import Dataset

MOST_NAMED = 3

State = Literal["ready", "incomplete", "missing"]


@dataclass(frozen=True)
class Check:
    """What was found of a data set."""

    dataset: str
    state: State
    folder: str
    classes: int
    train: int
    val: int
    test: int
    """Images that the lists name; 0 where they could not be read."""
    missing_images: int
    unreadable_images: int | None
    """None where images were not decoded."""
    problems: tuple[str, ...]
    """A line each."""
    notes: tuple[str, ...]
    """What else a user should know, a line each: it leaves a data set ready."""
    remedy: str
    """What to do; empty for a data set that is ready."""

    def as_plain(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {**asdict(self), "problems": list(self.problems), "notes": list(self.notes)}


def check_dataset(
    dataset: Dataset, data_root: Path, deep: bool = False, tick: Callable[[int, int], None] = lambda done, total: None
) -> Check:
    """Read a data set's lists, compare its counts with the catalogue's, and look for every image.

    deep: decode each image too. tick: called with the images looked at and their number.
    """
    folder = data_root / dataset.folder
    if not folder.is_dir():
        return _result(dataset, folder, "missing", None, 0, None, (f"{folder} does not exist",))
    try:
        splits = read_splits(dataset, data_root)
    except DataError as error:
        return _result(dataset, folder, "incomplete", None, 0, None, (str(error),))
    problems = _count_problems(dataset, splits)
    entries = [*splits.train, *splits.val, *splits.test]
    absent: list[str] = []
    unreadable: list[str] = []
    for done, entry in enumerate(entries, start=1):
        problem = _image_problem(folder, entry, deep)
        if problem is not None:
            (absent if problem == "" else unreadable).append(problem or entry.path)
        tick(done, len(entries))
    if absent:
        problems.append(f"{len(absent):,} of {len(entries):,} images are missing: {_some(absent)}")
    if unreadable:
        problems.append(f"{len(unreadable):,} images can't be decoded: {_some(unreadable)}")
    state: State = "incomplete" if problems else "ready"
    return _result(dataset, folder, state, splits, len(absent), len(unreadable) if deep else None, tuple(problems))


def _image_problem(folder: Path, entry: Entry, deep: bool) -> str | None:
    """None for an image that is there, an empty text for one that is not, else why it can't be decoded."""
    path = folder / entry.path
    if not path.is_file():
        return ""
    if deep:
        try:
            open_image(path)
        except UnreadableImage as error:
            return str(error)
    return None


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
        f"{found:,} {what}, published are {expected:,}"
        for what, found, expected in counts
        if expected is not None and found != expected
    ]


def _notes(splits: Splits) -> tuple[str, ...]:
    """What the lists say of classes and labels, as opening the data set tells it."""
    parts = {"training": splits.train, "validation": splits.val, "test": splits.test}
    labels = {name: [entry.label for entry in entries] for name, entries in parts.items()}
    absent = missing_text(list(splits.class_names.values()), labels)
    return (*splits.notices, absent) if absent else splits.notices


def _result(
    dataset: Dataset,
    folder: Path,
    state: State,
    splits: Splits | None,
    missing: int,
    unreadable: int | None,
    problems: tuple[str, ...],
) -> Check:
    entries = [] if splits is None else [*splits.train, *splits.val, *splits.test]
    return Check(
        dataset=dataset.name,
        state=state,
        folder=str(folder),
        classes=len({entry.label for entry in entries}),
        train=len(splits.train) if splits else 0,
        val=len(splits.val) if splits else 0,
        test=len(splits.test) if splits else 0,
        missing_images=missing,
        unreadable_images=unreadable,
        problems=problems,
        notes=() if splits is None else _notes(splits),
        remedy="" if state == "ready" else _remedy(dataset, folder),
    )


def _remedy(dataset: Dataset, folder: Path) -> str:
    if dataset.archive is not None:
        return f"`comkd datasets fetch {dataset.name}`, or prepare {folder} as CoOp's DATASETS.md tells"
    return f"put it at {folder}: {dataset.origin}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED:,} more"
