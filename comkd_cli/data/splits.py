"""Which images of a dataset of the suite are in train, val and test: few-shot draws, base and new classes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal

from comkd_cli.data.class_names import clean_name

Half = Literal["all", "base", "new"]
MOST_VAL_SHOTS = 4  # CoOp draws at most 4 validation images of a class, for any number of shots


@dataclass(frozen=True)
class Entry:
    """An image of a split."""

    path: str
    """Relative to the dataset's folder, with `/` separators."""
    label: int
    """From 0, without gaps: the position of the class among all that have images in any split."""
    class_name: str
    """As the split file writes it; prompts have spaces for its underscores."""


@dataclass(frozen=True)
class Splits:
    """The images of each split, in the order of the files that list them."""

    train: tuple[Entry, ...]
    val: tuple[Entry, ...]
    test: tuple[Entry, ...]
    notices: tuple[str, ...] = ()
    """For the user: classes without images, labels that were renumbered, skipped files."""

    @property
    def class_names(self) -> dict[int, str]:
        """The name of each label, as prompts use it, in the order of the labels."""
        named = {entry.label: entry.class_name for entry in (*self.train, *self.val, *self.test)}
        return {label: clean_name(named[label], "class names", f"label {label}") for label in sorted(named)}

    def as_plain(self) -> dict[str, list[list[Any]]]:
        """{"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
        return {
            name: [[entry.path, entry.label, entry.class_name] for entry in entries]
            for name, entries in (("train", self.train), ("val", self.val), ("test", self.test))
        }


def sample_shots(splits: Splits, shots: int, seed: int) -> Splits:
    """`shots` training images of each class, and at most 4 validation images; the test split stays.

    The draw is that of `draw_shots`.
    """
    train, val = draw_shots([entry.label for entry in splits.train], [entry.label for entry in splits.val], shots, seed)
    return replace(splits, train=tuple(splits.train[i] for i in train), val=tuple(splits.val[i] for i in val))


def draw_shots(train: Sequence[int], val: Sequence[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """The positions of `shots` training images of each class, and of at most 4 validation images.

    train, val: the labels of all images. As Dassl draws them: one stream of Python's `random`, seeded with
    the run's seed; the whole train list grouped by label in order of first appearance, `sample` in each
    group (all of a smaller one), then the val list likewise (Dassl.pytorch, data/datasets/base_dataset.py).
    """
    stream = random.Random(seed)
    return _draw(train, shots, stream), _draw(val, min(shots, MOST_VAL_SHOTS), stream)


def halves(classes: int) -> dict[Half, range]:
    """The labels of each half of this many classes: the first ceil(n / 2) are base (CoOp, subsample_classes)."""
    middle = ceil(classes / 2)
    return {"all": range(classes), "base": range(middle), "new": range(middle, classes)}


def select_half(splits: Splits, half: Half) -> Splits:
    """The images of the first half of the classes (base) or of the rest (new), relabelled from 0.

    Draw few-shot samples before, never after.
    """
    if half == "all":
        return splits
    labels = sorted({entry.label for entry in (*splits.train, *splits.val, *splits.test)})
    chosen = [labels[position] for position in halves(len(labels))[half]]
    relabelled = {label: position for position, label in enumerate(chosen)}

    def keep(entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return tuple(
            Entry(entry.path, relabelled[entry.label], entry.class_name)
            for entry in entries
            if entry.label in relabelled
        )

    return replace(splits, train=keep(splits.train), val=keep(splits.val), test=keep(splits.test))


def _draw(labels: Sequence[int], shots: int, stream: random.Random) -> list[int]:
    groups: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        groups.setdefault(label, []).append(position)
    chosen: list[int] = []
    for group in groups.values():
        chosen += stream.sample(group, shots) if len(group) >= shots else group
    return chosen
