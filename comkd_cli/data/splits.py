"""Which images a data set of the suite has in train, val and test, from its own split files."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from comkd_cli.data.class_names import class_key, clean_class_names, clean_name, some
from comkd_cli.data.image_files import is_image, is_junk, skipped_text, suffix_of
from comkd_cli.errors import DataError
from comkd_cli.recipe.catalog import Dataset

Half = Literal["all", "base", "new"]
MOST_VAL_SHOTS = 4  # CoOp draws at most so many validation images a class, however many shots


@dataclass(frozen=True)
class Entry:
    """An image of a split."""

    path: str
    """Relative to the data set's folder, with `/` separators."""
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
    """What a user should know of the lists: classes without images, labels that were renumbered, skipped files."""

    @property
    def class_names(self) -> dict[int, str]:
        """The name of each label, as prompts have it, in the order of the labels."""
        named = {entry.label: entry.class_name for entry in (*self.train, *self.val, *self.test)}
        return {label: clean_name(named[label], "class list", f"label {label}") for label in sorted(named)}

    def as_plain(self) -> dict[str, list[list[Any]]]:
        """{"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
        return {
            name: [[entry.path, entry.label, entry.class_name] for entry in entries]
            for name, entries in (("train", self.train), ("val", self.val), ("test", self.test))
        }


def read_splits(dataset: Dataset, data_root: Path) -> Splits:
    """The splits of a data set. Images need not be there, but for ImageNet and its variants, whose folders
    are their lists. Labels are positions among the classes that have images in any split: those of a subset, and
    labels with gaps, are renumbered in their order, with a notice. Raises DataError, naming the file.
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

    return replace(splits, train=keep(splits.train), val=keep(splits.val), test=keep(splits.test))


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
    try:
        listed = json.loads(_read(path, dataset))
        parts = {name: list(listed[name]) for name in ("train", "val", "test")}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path}: is not a split file with train, val and test lists of [path, label, class name]: {error!r}"
        ) from error
    prefix = f"{dataset.images}/" if dataset.images else ""
    entries = {
        name: tuple(_listed_entry(item, prefix, f"{path}: {name}[{position}]") for position, item in enumerate(items))
        for name, items in parts.items()
    }
    _check_labels(entries, path)
    splits = Splits(
        entries["train"], entries["val"], entries["test"], _shared_images(entries, f"{dataset.name}: {path.name}")
    )
    labels = sorted(splits.class_names)
    if labels == list(range(len(labels))):
        return splits
    told = (
        f"{dataset.name}: the {len(labels):,} labels of {path.name} run from {labels[0]:,} to {labels[-1]:,}; they are "
        f"renumbered from 0 to {len(labels) - 1:,}, in their order"
    )
    return _renumbered(splits, told)


def _listed_entry(item: Any, prefix: str, place: str) -> Entry:
    """One [path, label, class name] of a split file. Raises DataError."""
    if not (isinstance(item, list | tuple) and len(item) == 3):
        raise DataError(f"{place}: {item!r} is not [path, label, class name]")
    image, label, class_name = item
    if not isinstance(image, str) or not image:
        raise DataError(f"{place}: the path {image!r} is not a text")
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise DataError(f"{place}: the label {label!r} of {image} is not an integer from 0")
    if not isinstance(class_name, str):
        raise DataError(f"{place}: the class name {class_name!r} of {image} is not a text")
    return Entry(prefix + image, label, class_name)


def _check_labels(entries: Mapping[str, Sequence[Entry]], path: Path) -> None:
    """Refuse labels and class names that are not one to one, and an image under two labels. Raises DataError."""
    of_label: dict[int, tuple[str, str]] = {}
    of_key: dict[str, tuple[int, str]] = {}
    of_image: dict[str, tuple[int, str]] = {}
    keys: dict[str, str] = {}
    for split, listed in entries.items():
        for position, entry in enumerate(listed):
            place = f"{split}[{position}]"
            if entry.class_name not in keys:
                clean_name(entry.class_name, str(path), place)
                keys[entry.class_name] = class_key(entry.class_name)
            key = keys[entry.class_name]
            name, first = of_label.setdefault(entry.label, (entry.class_name, place))
            if keys[name] != key:
                raise DataError(
                    f"{path}: label {entry.label} is {name!r} in {first} and {entry.class_name!r} in {place}; "
                    "give each class one label"
                )
            label, first = of_key.setdefault(key, (entry.label, place))
            if label != entry.label:
                raise DataError(
                    f"{path}: {entry.class_name!r} has the label {label} in {first} and {entry.label} in {place}; "
                    "give each class one label"
                )
            label, first = of_image.setdefault(entry.path, (entry.label, place))
            if label != entry.label:
                raise DataError(
                    f"{path}: {entry.path} has the label {label} in {first} and {entry.label} in {place}; "
                    "list each image under one class"
                )


def _shared_images(entries: Mapping[str, Sequence[Entry]], what: str) -> tuple[str, ...]:
    """A notice where test images are training or validation images too, which makes their scores too high."""
    test, notices = {entry.path for entry in entries["test"]}, []
    for split in ("train", "val"):
        if shared := sorted(test & {entry.path for entry in entries[split]}):
            count = "1 image" if len(shared) == 1 else f"{len(shared):,} images"
            notices.append(f"{what} lists {count} in {split} and in test: {some(shared, 3)}")
    return tuple(notices)


def _renumbered(splits: Splits, notice: str) -> Splits:
    """The same images with labels from 0 without gaps, in the order of the labels."""
    position = {label: position for position, label in enumerate(splits.class_names)}

    def renumber(entries: Sequence[Entry]) -> tuple[Entry, ...]:
        return tuple(replace(entry, label=position[entry.label]) for entry in entries)

    return Splits(renumber(splits.train), renumber(splits.val), renumber(splits.test), (*splits.notices, notice))


def _of_class_list(splits: Splits, dataset: Dataset, listed: int, path: Path) -> Splits:
    """Labels of the classes that have images, where they are positions in a class list of `listed` names."""
    found = len(splits.class_names)
    if found == listed:
        return splits
    told = (
        f"{dataset.name}: {found:,} of the {listed:,} classes of {path.name} have images; the others are left out, and "
        "labels count those that have"
    )
    numbered = _renumbered(splits, told)
    # ImageNet-A and -R hold 200 classes of their own, whatever their class list holds.
    return replace(numbered, notices=splits.notices) if found == dataset.classes else numbered


def _from_aircraft_lists(dataset: Dataset, folder: Path) -> Splits:
    path = folder / "variants.txt"
    named = [(number, line) for number, line in _lines(path, dataset) if line]
    variants = [name for _, name in named]
    clean_class_names(variants, str(path), [number for number, _ in named])
    labels = {class_key(name): label for label, name in enumerate(variants)}

    def split(name: str) -> tuple[Entry, ...]:
        path = folder / f"images_variant_{name}.txt"
        entries = []
        for number, line in _lines(path, dataset):
            if not line:
                continue
            image, _, variant = line.partition(" ")
            if class_key(variant) not in labels:
                raise DataError(f"{path}: line {number}: {variant!r} is not in variants.txt")
            entries.append(Entry(f"{dataset.images}/{image}.jpg", labels[class_key(variant)], variant))
        return tuple(entries)

    return _of_class_list(Splits(split("train"), split("val"), split("test")), dataset, len(variants), path)


def _from_folders(dataset: Dataset, folder: Path) -> Splits:
    path = folder / "classnames.txt"
    names = read_imagenet_classes(path, dataset)
    images = folder / dataset.images
    skipped: Counter[str] = Counter()
    notices: list[str] = []
    if dataset.layout == "imagenet":
        train, test = (_listed_by_folders(folder, images / part, names, path, skipped) for part in ("train", "val"))
    else:
        if images.is_dir() and not any((images / synset).is_dir() for synset, _ in names):
            # ImageNetV2 names its folders by the line of the class.
            names = [(str(line), name) for line, (_, name) in enumerate(names)]
            if len(names) != dataset.classes:
                notices.append(
                    f"{dataset.name}: its folders are numbered by the lines of {path.name}, which has {len(names):,} "
                    f"of {dataset.classes:,}; a shorter list than the published one numbers other classes"
                )
        train, test = (), _listed_by_folders(folder, images, names, path, skipped)
    splits = _of_class_list(Splits(train, (), test), dataset, len(names), path)
    if repeated := _repeated_names(splits, names):
        notices.append(f"{dataset.name}: {path.name} gives the same name, and so the same prompt, to {repeated}")
    if text := skipped_text(skipped):
        notices.append(f"{dataset.name}: {text}")
    return replace(splits, notices=(*splits.notices, *notices))


def _repeated_names(splits: Splits, names: Sequence[tuple[str, str]]) -> str:
    """Classes with images whose names are alike, as OpenAI's list of ImageNet has some: told, since published
    figures are made with them.
    """
    present = {class_key(name) for name in splits.class_names.values()}
    of_key: dict[str, list[str]] = {}
    for subfolder, name in names:
        of_key.setdefault(class_key(name), []).append(f"{subfolder} ({name})")
    return some([" and ".join(alike) for key, alike in of_key.items() if len(alike) > 1 and key in present])


def read_imagenet_classes(path: Path, dataset: Dataset) -> list[tuple[str, str]]:
    """(synset, class name) of each line `nXXXXXXXX name...`, in order of the labels. Raises DataError."""
    lines = _lines(path, dataset)
    while lines and not lines[-1][1]:
        lines.pop()
    pairs: list[tuple[str, str]] = []
    first: dict[str, int] = {}
    for number, line in lines:
        synset, *name = line.split(maxsplit=1) or [""]
        if not name:  # an empty line too: folders of ImageNetV2 are numbered by the lines
            raise DataError(f"{path}: line {number}: {line!r} is not a folder name and a class name")
        if first.setdefault(synset, number) != number:
            raise DataError(f"{path}: line {number}: {synset} is listed in line {first[synset]} already")
        clean_name(name[0], str(path), f"line {number}")
        pairs.append((synset, name[0]))
    if len(pairs) < 2:
        raise DataError(f"{path}: there must be at least 2 classes to tell apart, not {len(pairs)}")
    return pairs


def _listed_by_folders(
    folder: Path, images: Path, names: Sequence[tuple[str, str]], class_list: Path, skipped: Counter[str]
) -> tuple[Entry, ...]:
    """Every image in each class folder, by name: the order that a directory gives differs between disks.

    Labels are positions in `names`. Other files are counted in `skipped`, by suffix. Raises DataError for class
    folders that are not listed, and for images anywhere else.
    """
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; see `comkd datasets check`")
    loose, subfolders = _files_and_folders(images, skipped)
    if loose:
        raise DataError(
            f"{images}: {len(loose):,} images lie in no class folder: {some(loose)}; move each into the folder of its "
            f"class, named as in {class_list.name}"
        )
    if unknown := sorted(set(subfolders) - {subfolder for subfolder, _ in names}):
        raise DataError(
            f"{images}: {class_list} does not list the folders {some(unknown)}; add a line for each, or move them away"
        )
    present, entries = set(subfolders), []
    for label, (subfolder, name) in enumerate(names):
        if subfolder not in present:
            continue
        prefix = (images / subfolder).relative_to(folder).as_posix()
        files, below = _files_and_folders(images / subfolder, skipped)
        if below:
            raise DataError(
                f"{images / subfolder}: holds folders ({some(below)}); images must lie directly in the class folder: "
                "move them there, or the folders away"
            )
        entries += [Entry(f"{prefix}/{file}", label, name) for file in files]
    if not entries:
        raise DataError(f"{images}: holds no images; see `comkd datasets check`")
    return tuple(entries)


def _files_and_folders(folder: Path, skipped: Counter[str]) -> tuple[list[str], list[str]]:
    """The names of a folder's images and of its sub-folders, both sorted; other files are counted, junk is not."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif is_image(entry.name):
                    files.append(entry.name)
                else:
                    skipped[suffix_of(entry.name)] += 1
    except OSError as error:
        raise DataError(f"{folder}: can't be read: {error.strerror}") from error
    return sorted(files), sorted(folders)


def _lines(path: Path, dataset: Dataset) -> list[tuple[int, str]]:
    """The number and the text of each line, without white space at its ends. Raises DataError."""
    # Not str.splitlines, which also splits at characters that an editor shows within a line.
    return [(number, line.strip()) for number, line in enumerate(_read(path, dataset).split("\n"), start=1)]


def _read(path: Path, dataset: Dataset) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: is missing; {dataset.name} can't be read without it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from error
