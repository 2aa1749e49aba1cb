"""Which images a data set of the suite has in train, val and test, from its own split files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from comkd_cli.catalog import Dataset
from comkd_cli.errors import DataError

Half = Literal["all", "base", "new"]
MOST_VAL_SHOTS = 4  # CoOp draws at most so many validation images a class, however many shots


@dataclass(frozen=True)
class Entry:
    """An image of a split."""

    path: str
    """Relative to the data set's folder, with `/` separators."""
    label: int
    class_name: str
    """As the split file writes it; prompts have spaces for its underscores."""


@dataclass(frozen=True)
class Splits:
    """The images of each split, in the order of the files that list them."""

    train: tuple[Entry, ...]
    val: tuple[Entry, ...]
    test: tuple[Entry, ...]

    def as_plain(self) -> dict[str, list[list[Any]]]:
        """{"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
        return {
            name: [[entry.path, entry.label, entry.class_name] for entry in entries]
            for name, entries in (("train", self.train), ("val", self.val), ("test", self.test))
        }


def read_splits(dataset: Dataset, data_root: Path) -> Splits:
    """The splits of a data set. Images need not be there, but for ImageNet and its variants, whose folders
    are their lists. Raises DataError, naming the file.
    """
    folder = data_root / dataset.folder
    if dataset.layout == "split":
        return _from_json(dataset, folder)
    if dataset.layout == "aircraft":
        return _from_aircraft_lists(dataset, folder)
    return _from_folders(dataset, folder)


def sample_shots(splits: Splits, shots: int, seed: int) -> Splits:
    """`shots` training images of each class, and at most 4 validation images; the test split stays.

    The draw is that of `draw_shots`.
    """
    train, val = draw_shots([entry.label for entry in splits.train], [entry.label for entry in splits.val], shots, seed)
    return Splits(tuple(splits.train[i] for i in train), tuple(splits.val[i] for i in val), splits.test)


def draw_shots(train: Sequence[int], val: Sequence[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """The positions of `shots` training images of each class, and of at most 4 validation images.

    train, val: the labels of all images. As Dassl draws them: one stream of Python's `random`, seeded with
    the run's seed; the whole train list grouped by label in order of first appearance, `sample` in each
    group (all of a smaller one), then the val list likewise (Dassl.pytorch, data/datasets/base_dataset.py).
    """
    stream = random.Random(seed)
    return _draw(train, shots, stream), _draw(val, min(shots, MOST_VAL_SHOTS), stream)


def halves(classes: int) -> dict[Half, range]:
    """The labels of each half of so many classes: the first ceil(n / 2) are base (CoOp, subsample_classes)."""
    middle = ceil(classes / 2)
    return {"all": range(classes), "base": range(middle), "new": range(middle, classes)}


def select_half(splits: Splits, half: Half) -> Splits:
    """The images of the first half of the classes (base) or of the rest (new), relabelled from 0.

    Few-shot samples are drawn before this, never after.
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

    return Splits(keep(splits.train), keep(splits.val), keep(splits.test))


def _draw(labels: Sequence[int], shots: int, stream: random.Random) -> list[int]:
    groups: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        groups.setdefault(label, []).append(position)
    chosen: list[int] = []
    for group in groups.values():
        chosen += stream.sample(group, shots) if len(group) >= shots else group
    return chosen


def _from_json(dataset: Dataset, folder: Path) -> Splits:
    path = folder / str(dataset.split_file)
    prefix = f"{dataset.images}/" if dataset.images else ""
    try:
        listed = json.loads(_read(path, dataset))
        parts = {
            name: tuple(
                Entry(prefix + str(image), int(label), str(class_name)) for image, label, class_name in listed[name]
            )
            for name in ("train", "val", "test")
        }
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: is not a split file with train, val and test lists of [path, label, class name]: {error!r}"
        ) from error
    return Splits(**parts)


def _from_aircraft_lists(dataset: Dataset, folder: Path) -> Splits:
    variants = [line.strip() for line in _read(folder / "variants.txt", dataset).splitlines() if line.strip()]
    labels = {name: label for label, name in enumerate(variants)}

    def split(name: str) -> tuple[Entry, ...]:
        path = folder / f"images_variant_{name}.txt"
        entries = []
        for number, line in enumerate(_read(path, dataset).splitlines(), start=1):
            if not line.strip():
                continue
            image, _, variant = line.strip().partition(" ")
            if variant not in labels:
                raise DataError(f"{path}: line {number}: {variant!r} is not in variants.txt")
            entries.append(Entry(f"{dataset.images}/{image}.jpg", labels[variant], variant))
        return tuple(entries)

    return Splits(split("train"), split("val"), split("test"))


def _from_folders(dataset: Dataset, folder: Path) -> Splits:
    names = read_imagenet_classes(folder / "classnames.txt", dataset)
    images = folder / dataset.images
    if dataset.layout == "imagenet":
        train, test = (tuple(_listed(folder, images / part, names)) for part in ("train", "val"))
        return Splits(train, (), test)
    present = [(synset, name) for synset, name in names if (images / synset).is_dir()]
    if not present:  # ImageNetV2 names its folders by the line of the class
        present = [(str(line), name) for line, (_, name) in enumerate(names)]
    # ImageNet-A and -R hold 200 classes of their own, whatever their class list holds.
    return Splits((), (), tuple(_listed(folder, images, present)))


def read_imagenet_classes(path: Path, dataset: Dataset) -> list[tuple[str, str]]:
    """(synset, class name) of each line `nXXXXXXXX name...`, in order of the labels. Raises DataError."""
    pairs = [line.strip().partition(" ") for line in _read(path, dataset).splitlines() if line.strip()]
    return [(synset, name) for synset, _, name in pairs]


def _listed(folder: Path, images: Path, names: Sequence[tuple[str, str]]) -> Iterator[Entry]:
    """Every file below each class folder, by name: the order that a directory gives differs between disks."""
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; see `comkd datasets check`")
    for label, (subfolder, name) in enumerate(names):
        if (images / subfolder).is_dir():
            prefix = (images / subfolder).relative_to(folder).as_posix()
            for file in sorted(path.name for path in (images / subfolder).iterdir()):
                if not file.startswith("."):
                    yield Entry(f"{prefix}/{file}", label, name)


def _read(path: Path, dataset: Dataset) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: is missing; {dataset.name} can't be read without it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from error
