"""Reads the splits of a dataset of the suite from its own lists: a json file, text files, or folders."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from comkd_cli.data.class_names import check_class_count, class_key, clean_class_names, clean_name, some
from comkd_cli.data.image_files import is_image, is_junk, skipped_text, suffix_of
from comkd_cli.data.splits import Entry, Splits
from comkd_cli.errors import DataError
from comkd_cli.recipe.catalog import Dataset


def read_splits(dataset: Dataset, data_root: Path) -> Splits:
    """The splits of a dataset. Images need not exist, except for ImageNet and its variants, whose folders are their
    lists. Labels are positions among the classes that have images in any split: those of a subset, and labels with
    gaps, are renumbered in their order, with a notice. Raises DataError, naming the file.
    """
    folder = data_root / dataset.folder
    if dataset.layout == "split":
        return _from_json(dataset, folder)
    if dataset.layout == "aircraft":
        return _from_aircraft_lists(dataset, folder)
    return _from_folders(dataset, folder)


def _from_json(dataset: Dataset, folder: Path) -> Splits:
    path = folder / str(dataset.split_file)
    try:
        listed = json.loads(_read(path, dataset))
        parts = {name: list(listed[name]) for name in ("train", "val", "test")}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            "is not a split file with train, val and test lists of [path, label, class name]",
            path=path,
            found=repr(error),
        ) from error
    prefix = f"{dataset.images}/" if dataset.images else ""
    entries = {
        name: tuple(_listed_entry(item, prefix, path, f"{name}[{position}]") for position, item in enumerate(items))
        for name, items in parts.items()
    }
    check = _LabelCheck(path)
    for name, listed_entries in entries.items():
        for position, entry in enumerate(listed_entries):
            check.add(entry, f"{name}[{position}]")
    splits = Splits(
        entries["train"], entries["val"], entries["test"], _shared_images(entries, f"{dataset.name}: {path.name}")
    )
    labels = sorted(splits.class_names)
    if labels == list(range(len(labels))):
        return splits
    notice = (
        f"{dataset.name}: the {len(labels):,} labels of {path.name} run from {labels[0]:,} to {labels[-1]:,}; they are "
        f"renumbered from 0 to {len(labels) - 1:,}, in their order"
    )
    return _renumbered(splits, notice)


def _listed_entry(item: Any, prefix: str, path: Path, position: str) -> Entry:
    """One [path, label, class name] of a split file. Raises DataError."""
    if not (isinstance(item, list | tuple) and len(item) == 3):
        raise DataError("is not [path, label, class name]", path=path, field=position, found=repr(item))
    image, label, class_name = item
    checks = (
        ("path", image, isinstance(image, str) and bool(image), "a non-empty text"),
        ("label", label, isinstance(label, int) and not isinstance(label, bool) and label >= 0, "integers from 0"),
        ("class name", class_name, isinstance(class_name, str), "a text"),
    )
    for what, value, is_valid, allowed in checks:
        if not is_valid:
            raise DataError(f"invalid {what}", path=path, field=position, found=repr(value), allowed=allowed)
    return Entry(prefix + image, label, class_name)


class _LabelCheck:
    """Checks that labels and classes correspond one to one, and that no image has two labels."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._class_of_label: dict[int, tuple[str, str]] = {}
        self._label_of_class: dict[str, tuple[int, str]] = {}
        self._label_of_image: dict[str, tuple[int, str]] = {}
        self._keys: dict[str, str] = {}
        """Of each class name that was checked."""

    def add(self, entry: Entry, position: str) -> None:
        """Check one entry against those before it. Raises DataError."""
        if entry.class_name not in self._keys:
            clean_name(entry.class_name, self._path, position)
            self._keys[entry.class_name] = class_key(entry.class_name)
        key, here = self._keys[entry.class_name], (entry.label, position)
        name, first = self._class_of_label.setdefault(entry.label, (entry.class_name, position))
        if self._keys[name] != key:
            raise DataError(
                f"label {entry.label} is {name!r} in {first}, but here",
                path=self._path,
                field=position,
                found=repr(entry.class_name),
                remedy="give each class one label",
            )
        for what, (label, first), remedy in (
            (repr(entry.class_name), self._label_of_class.setdefault(key, here), "give each class one label"),
            (entry.path, self._label_of_image.setdefault(entry.path, here), "list each image under one class"),
        ):
            if label != entry.label:
                raise DataError(
                    f"{what} has the label {label} in {first}, but here",
                    path=self._path,
                    field=position,
                    found=entry.label,
                    remedy=remedy,
                )


def _shared_images(entries: Mapping[str, Sequence[Entry]], what: str) -> tuple[str, ...]:
    """A notice if test images are also training or validation images, which makes their scores too high."""
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
    """Labels of the classes that have images, if they are positions in a class list of `listed` names."""
    found = len(splits.class_names)
    if found == listed:
        return splits
    notice = (
        f"{dataset.name}: {found:,} of the {listed:,} classes of {path.name} have images; the others are skipped, and "
        "labels are numbered without them"
    )
    numbered = _renumbered(splits, notice)
    # ImageNet-A and -R have 200 classes of their own, however long their class list is.
    return replace(numbered, notices=splits.notices) if found == dataset.classes else numbered


def _from_aircraft_lists(dataset: Dataset, folder: Path) -> Splits:
    path = folder / "variants.txt"
    named = [(number, line) for number, line in _lines(path, dataset) if line]
    variants = [name for _, name in named]
    clean_class_names(variants, path, [number for number, _ in named])
    labels = {class_key(name): label for label, name in enumerate(variants)}

    def split(name: str) -> tuple[Entry, ...]:
        path = folder / f"images_variant_{name}.txt"
        entries = []
        for number, line in _lines(path, dataset):
            if not line:
                continue
            image, _, variant = line.partition(" ")
            if class_key(variant) not in labels:
                raise DataError("is not in variants.txt", path=path, field=f"line {number}", found=repr(variant))
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
                    f"{dataset.name}: {path.name} has {len(names):,} lines instead of {dataset.classes:,}. The image "
                    "folders are numbered by line, so images may get the names of other classes; use the published file"
                )
        train, test = (), _listed_by_folders(folder, images, names, path, skipped)
    splits = _of_class_list(Splits(train, (), test), dataset, len(names), path)
    if repeated := _repeated_names(splits, names):
        notices.append(f"{dataset.name}: {path.name} gives the same name, and so the same prompt, to {repeated}")
    if text := skipped_text(skipped):
        notices.append(f"{dataset.name}: {text}")
    return replace(splits, notices=(*splits.notices, *notices))


def _repeated_names(splits: Splits, names: Sequence[tuple[str, str]]) -> str:
    """Classes with images that share a name, such as some of OpenAI's list of ImageNet.

    They are reported, not refused, because published results use them.
    """
    present = {class_key(name) for name in splits.class_names.values()}
    of_key: dict[str, list[str]] = {}
    for subfolder, name in names:
        of_key.setdefault(class_key(name), []).append(f"{subfolder} ({name})")
    return some([" and ".join(same) for key, same in of_key.items() if len(same) > 1 and key in present])


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
            raise DataError(
                "is not a folder name and a class name", path=path, field=f"line {number}", found=repr(line)
            )
        if first.setdefault(synset, number) != number:
            raise DataError(f"is already in line {first[synset]}", path=path, field=f"line {number}", found=synset)
        clean_name(name[0], path, f"line {number}")
        pairs.append((synset, name[0]))
    check_class_count(len(pairs), path)
    return pairs


def _listed_by_folders(
    folder: Path, images: Path, names: Sequence[tuple[str, str]], class_list: Path, skipped: Counter[str]
) -> tuple[Entry, ...]:
    """Every image in each class folder, by name, because the order of a directory differs between disks.

    Labels are positions in `names`. Other files are counted in `skipped`, by suffix. Raises DataError for class
    folders that are not listed, and for images anywhere else.
    """
    if not images.is_dir():
        raise DataError("no such folder", path=images, remedy="see `comkd datasets check`")
    loose, subfolders = _files_and_folders(images, skipped)
    if loose:
        raise DataError(
            f"{len(loose):,} images are in no class folder",
            path=images,
            found=some(loose),
            remedy=f"move each into the folder of its class, named as in {class_list.name}",
        )
    if unknown := sorted(set(subfolders) - {subfolder for subfolder, _ in names}):
        raise DataError(
            f"has folders that {class_list} does not list",
            path=images,
            found=some(unknown),
            remedy="add a line for each, or move them away",
        )
    present, entries = set(subfolders), []
    for label, (subfolder, name) in enumerate(names):
        if subfolder not in present:
            continue
        prefix = (images / subfolder).relative_to(folder).as_posix()
        files, below = _files_and_folders(images / subfolder, skipped)
        if below:
            raise DataError(
                "is a class folder and contains folders",
                path=images / subfolder,
                found=some(below),
                remedy="move their images directly into the class folder, or move these folders away",
            )
        entries += [Entry(f"{prefix}/{file}", label, name) for file in files]
    if not entries:
        raise DataError("contains no images", path=images, remedy="see `comkd datasets check`")
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
        raise DataError("could not be read", path=folder, found=error.strerror) from error
    return sorted(files), sorted(folders)


def _lines(path: Path, dataset: Dataset) -> list[tuple[int, str]]:
    """The number and the text of each line, without white space at its ends. Raises DataError."""
    # Not str.splitlines, which also splits at characters that an editor shows within a line.
    return [(number, line.strip()) for number, line in enumerate(_read(path, dataset).split("\n"), start=1)]


def _read(path: Path, dataset: Dataset) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"is missing from {dataset.name}", path=path, remedy="see `comkd datasets check`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("could not be read", path=path, found=str(error)) from error
