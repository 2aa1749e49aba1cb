"""A user's own folder of images as a source: unlabelled, or train/ and test/ with a sub-folder a class."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from comkd_cli.data.contents import FileContents
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.errors import DataError
from comkd_cli.predictor import open_image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


SPLITS = ("train", "val", "test")


def folder_source(folder: Path, classes: Sequence[str] | None, template: str) -> Source:
    """The images below a folder.

    With train/, val/ or test/ in it, those are the splits, and sub-folders named after the classes give the
    labels; without test/, val/ is what is scored. Otherwise every image anywhere below is unlabelled training
    data. classes: the names in label order; None takes the sub-folder names, sorted. Raises DataError, also
    for images that no split would take.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images; check `data.folder` and --data-root")
    images = images_below(folder)
    if not len(images):
        raise DataError(f"{folder}: holds no images; comkd reads {', '.join(sorted(SUFFIXES))}")
    splits = [name for name in SPLITS if (folder / name).is_dir()]
    if classes is None:
        classes = _class_names_of_folders(folder, splits)
    check_class_names(classes, str(folder))
    name, names = folder.resolve().name, tuple(classes)
    if not splits:
        _check_split_names(folder)
        return Source(name, names, template, images, None)
    found = {split: _split(folder / split, names) for split in SPLITS}
    _check_nothing_is_left(folder, images, found)
    present = {split: image_set for split, image_set in found.items() if len(image_set)}
    train = found["train"]
    test, val = present.get("test"), present.get("val")
    return Source(name, names, template, train, test or val, val if test and val and val.labels else None)


def _check_split_names(folder: Path) -> None:
    """Refuse a folder whose splits are there under other spellings, and would pass for unlabelled images."""
    for name in _subfolders(folder):
        if name.casefold() in SPLITS:
            raise DataError(f"{folder / name}: should be called {name.casefold()}, to be taken as that split")


def _check_nothing_is_left(folder: Path, images: ImageSet, splits: Mapping[str, ImageSet]) -> None:
    """Refuse a folder with images that neither split takes: leaving them out silently would hide a mistake."""
    taken = {f"{split}/{key}" for split, image_set in splits.items() for key in image_set.keys}
    if left := [key for key in images.keys if key not in taken]:
        raise DataError(
            f"{folder}: has splits, and {len(left)} images that belong to none: {_some(left)}; move them into a "
            "class folder of train/ or test/, or out of the folder"
        )


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file, one a line; empty lines are skipped. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the class list can't be read: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    check_class_names(names, str(path))
    return names


def check_class_names(names: Sequence[str], origin: str) -> None:
    """Refuse a class list with fewer than two names, an empty one, or the same name twice."""
    positions: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names, start=1):
        if not name.strip() or len(name.splitlines()) > 1:
            raise DataError(f"{origin}: class {position} is empty or has a line break; remove or name it")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise DataError(f"{origin}: class {position} is not UTF-8: {name!r}; rename it")
        positions[class_key(name)].append(position)
    repeated = [
        f"{names[where[0] - 1]!r} at {' and '.join(map(str, where))}" for where in positions.values() if len(where) > 1
    ]
    if repeated:
        raise DataError(f"{origin}: the class list repeats {'; '.join(repeated)}; each class stands once")
    if len(names) < 2:
        raise DataError(f"{origin}: there must be at least 2 classes to tell apart, not {len(names)}")


def class_key(name: str) -> str:
    """What two spellings of one class share: case, underscores for spaces, composed or decomposed accents."""
    return unicodedata.normalize("NFC", name).replace("_", " ").strip().casefold()


def find_images(folder: Path) -> Iterator[Path]:
    """Every image file anywhere below a folder, in a fixed order; links are followed, hidden names skipped."""
    seen: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(parent) / name


def _refuse(error: OSError) -> None:
    """A folder that can't be listed would make the data set smaller without a word."""
    raise DataError(f"{error.filename}: can't be read: {error.strerror}") from error


def open_below(root: Path, key: str) -> Image.Image:
    """The RGB image at a path below a folder. Raises UnreadableImage."""
    return open_image(root / key)


def _image_set(root: Path, paths: Sequence[Path], labels: Sequence[int] | None) -> ImageSet:
    return ImageSet(
        keys=tuple(path.relative_to(root).as_posix() for path in paths),
        labels=None if labels is None else tuple(labels),
        open_key=partial(open_below, root),
        contents=FileContents(root),
    )


def images_below(folder: Path) -> ImageSet:
    """Every image anywhere below a folder, unlabelled."""
    return _image_set(folder, list(find_images(folder)), None)


def _split(folder: Path, classes: Sequence[str]) -> ImageSet:
    """One of train/, val/ and test/: labelled by its sub-folders, or unlabelled where it has none."""
    if not folder.is_dir():
        return ImageSet((), None, partial(open_below, folder), FileContents(folder))
    subfolders = _subfolders(folder)
    if not subfolders:
        return images_below(folder)
    label_of = {class_key(name): label for label, name in enumerate(classes)}
    unknown = [name for name in subfolders if class_key(name) not in label_of]
    if unknown:
        raise DataError(
            f"{folder}: {_some(unknown)} {'is' if len(unknown) == 1 else 'are'} not in the class list; "
            "name each sub-folder as its class, or leave `data.classes` out"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for name in subfolders:
        found = list(find_images(folder / name))
        paths += found
        labels += [label_of[class_key(name)]] * len(found)
    return _image_set(folder, paths, labels)


def _class_names_of_folders(folder: Path, splits: Sequence[str]) -> list[str]:
    names = {split: {_as_class_name(name) for name in _subfolders(folder / split)} for split in splits}
    found = sorted(set().union(*names.values()))
    if not found:
        raise DataError(
            f"{folder}: the images have no classes; give `data.classes` (a list, or a text file with a name "
            "a line), or sort them into train/ and test/ with a sub-folder a class"
        )
    for split in splits:
        if names[split] and (absent := sorted(set(found) - names[split])):
            raise DataError(
                f"{folder / split}: lacks a sub-folder for {_some(absent)}, which another split has; "
                "add it (empty is fine), or give `data.classes`"
            )
    return found


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _as_class_name(folder_name: str) -> str:
    return folder_name.replace("_", " ").strip()


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
