"""A user's own folder of images as a source: unlabelled, or train/ and test/ with a sub-folder for each class."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from PIL import Image

from comkd_cli.data.class_names import class_key, clean_class_names, clean_name, some
from comkd_cli.data.contents import NO_REGULAR_FILE, FileContents
from comkd_cli.data.image_files import SUFFIXES, is_image, is_junk, skipped_text, suffix_of
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.edge.images import UnreadableImage, open_image
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report

SPLITS = ("train", "val", "test")

# Other common names of the splits, and the name that comkd uses.
OTHER_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tests", "holdout"), "test"),
}
# Parts of such names that do not say which split it is, as in train2017, val_images and test-data.
SPLIT_NAME_EXTRA = re.compile(r"[\W\d_]+|dataset|data|images?|imgs?|jpe?g|png|sets?|splits?")


def folder_source(
    folder: Path, classes: Sequence[str] | None, template: str, report: Report = lambda event: None
) -> Source:
    """The images below a folder.

    With train/, val/ or test/ in it, those are the splits, and sub-folders named after the classes give the
    labels; without test/, val/ is scored. Otherwise every image anywhere below is unlabelled training
    data. classes: the names in label order; None takes the sub-folder names, sorted. Skipped files are
    reported. Raises DataError, also for images that belong to no split.
    """
    if not folder.is_dir():
        raise DataError("no such folder of images", path=folder, remedy="check `data.folder` and --data-root")
    if classes is not None:
        classes = clean_class_names(classes, "data.classes")
    subfolders = _subfolders(folder)
    _check_split_names(folder, subfolders)
    if not any(name in SPLITS for name in subfolders):
        return _unlabelled(folder, classes, template, report)
    skipped: Counter[str] = Counter()
    splits = {name: _read_split(folder / name, folder, skipped) for name in SPLITS if name in subfolders}
    stray = _stray_images(folder, subfolders, splits, skipped)
    if not (stray or any(split.images for split in splits.values())):
        raise _no_images(folder, skipped)
    names = tuple(_class_names_of_folders(folder, splits) if classes is None else classes)
    found = {name: _labelled(split, names) for name, split in splits.items()}
    if stray:
        raise DataError(
            f"has splits, and {len(stray)} images that belong to none",
            path=folder,
            found=some(stray),
            remedy="move them into a class folder of train/ or test/, or out of the folder",
        )
    _report_skipped(folder, skipped, report)
    _report_unused(folder, splits, found, report)
    train = found.get("train", _image_set(folder / "train", [], None))
    test, val = (found[name] if name in found and len(found[name]) else None for name in ("test", "val"))
    few_shot = val if test and val and val.labels else None
    return Source(folder.resolve().name, names, template, train, test or val, few_shot)


def images_below(folder: Path, report: Report = lambda event: None) -> ImageSet:
    """Every image anywhere below a folder, unlabelled. Skipped files are reported."""
    skipped: Counter[str] = Counter()
    images = _image_set(folder, list(find_images(folder, skipped)), None)
    _report_skipped(folder, skipped, report)
    return images


def find_images(folder: Path, skipped: Counter[str] | None = None, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Every image file anywhere below a folder, in a fixed order; links are followed, hidden and junk names skipped.

    skipped: other files are counted in it, by suffix. above: folders that the folder lies in, for links that lead
    back up to them. Raises DataError for a folder that cannot be listed.
    """
    seen = {os.path.realpath(path) for path in above}
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_junk(name))
        for name in sorted(names):
            if is_image(name):
                yield Path(parent) / name
            elif skipped is not None and not is_junk(name):
                skipped[suffix_of(name)] += 1


def open_below(root: Path, key: str) -> Image.Image:
    """The RGB image at a path below a folder. Raises UnreadableImage."""
    path = root / key
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise UnreadableImage(f"{path}: {NO_REGULAR_FILE}")
    return open_image(path)


@dataclass(frozen=True)
class _Split:
    """The images of one of train/, val/ and test/."""

    folder: Path
    classes: Mapping[str, Sequence[Path]]
    """By the name of each sub-folder, sorted, the images below it."""
    loose: Sequence[Path]
    """Images directly in the split."""

    @property
    def images(self) -> list[Path]:
        return [*self.loose, *(path for paths in self.classes.values() for path in paths)]


def _unlabelled(folder: Path, classes: Sequence[str] | None, template: str, report: Report) -> Source:
    skipped: Counter[str] = Counter()
    images = _image_set(folder, list(find_images(folder, skipped)), None)
    if not len(images):
        raise _no_images(folder, skipped)
    if classes is None:
        raise _no_classes(folder)
    _check_splits_further_down(folder, images.keys)
    _report_skipped(folder, skipped, report)
    return Source(folder.resolve().name, tuple(classes), template, images, None)


def _read_split(path: Path, root: Path, skipped: Counter[str]) -> _Split:
    """One split of the folder `root`. Raises DataError where two class folders are one folder, or one class."""
    classes: dict[str, list[Path]] = {}
    real: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for name in _subfolders(path):
        other = spellings.setdefault(class_key(name), name)
        if other != name:
            raise DataError(
                "has two folders with spellings of one class", path=path, found=f"{other}, {name}", remedy="merge them"
            )
        other = real.setdefault(os.path.realpath(path / name), name)
        if other != name:
            raise DataError(
                "two class folders are the same folder by a link",
                path=path,
                found=f"{other}, {name}",
                remedy="remove the link: an image has one class",
            )
        classes[name] = list(find_images(path / name, skipped, above=(root, path)))
    return _Split(path, classes, [path / name for name in _files(path, skipped)])


def _stray_images(
    folder: Path, subfolders: Sequence[str], splits: Mapping[str, _Split], skipped: Counter[str]
) -> list[str]:
    """Paths below a folder with splits, of images that are in none, or beside the class folders of one."""
    stray = [Path(folder / name) for name in _files(folder, skipped)]
    for name in subfolders:
        if name not in splits:
            stray += find_images(folder / name, skipped, above=(folder,))
        elif splits[name].classes:
            stray += splits[name].loose
    return [path.relative_to(folder).as_posix() for path in stray]


def _labelled(split: _Split, classes: Sequence[str]) -> ImageSet:
    """The images of a split: labelled by its sub-folders, or unlabelled where it has none. Raises DataError."""
    if not split.classes:
        return _image_set(split.folder, split.images, None)
    label_of = {class_key(name): label for label, name in enumerate(classes)}
    if unknown := [name for name in split.classes if class_key(name) not in label_of]:
        raise DataError(
            "has sub-folders that are not in the class list",
            path=split.folder,
            found=some(unknown),
            remedy="name each sub-folder as its class, or leave `data.classes` out",
        )
    labels = [label_of[class_key(name)] for name, paths in split.classes.items() for _ in paths]
    return _image_set(split.folder, [path for paths in split.classes.values() for path in paths], labels)


def _image_set(root: Path, paths: Sequence[Path], labels: Sequence[int] | None) -> ImageSet:
    return ImageSet(
        keys=tuple(path.relative_to(root).as_posix() for path in paths),
        labels=None if labels is None else tuple(labels),
        open_key=partial(open_below, root),
        contents=FileContents(root),
    )


def _class_names_of_folders(folder: Path, splits: Mapping[str, _Split]) -> list[str]:
    """The names of all class folders, sorted. Raises DataError where a split lacks one that another has."""
    found: dict[str, str] = {}
    for split in splits.values():
        for name in split.classes:
            found.setdefault(class_key(name), clean_name(name, split.folder, "the folder name"))
    if not found:
        raise _no_classes(folder)
    for split in splits.values():
        present = {class_key(name) for name in split.classes}
        if present and (absent := [name for key, name in found.items() if key not in present]):
            raise DataError(
                "lacks sub-folders that another split has",
                path=split.folder,
                found=some(sorted(absent)),
                remedy="add them (empty is fine), or give `data.classes`",
            )
    return clean_class_names(sorted(found.values()), folder)


def _check_split_names(folder: Path, subfolders: Sequence[str]) -> None:
    """Refuse a folder whose splits have other names: they would be taken for unlabelled images."""
    for name in subfolders:
        meant = _split_meant(name)
        if meant and name not in SPLITS and any(find_images(folder / name)):
            raise DataError(
                "looks like a split with another name",
                path=folder / name,
                allowed=SPLITS,
                remedy=f"rename it to {meant}, or move it out of the folder",
            )


def _split_meant(name: str) -> str | None:
    """The split that a folder's name means, in any spelling; None for other names."""
    return OTHER_SPLIT_NAMES.get(SPLIT_NAME_EXTRA.sub("", name.casefold()))


def _check_splits_further_down(folder: Path, keys: Sequence[str]) -> None:
    """Refuse unlabelled images in splits one or more folders further down: test images would be trained on."""
    inside: dict[PurePosixPath, dict[str, str]] = defaultdict(dict)
    for parent in {PurePosixPath(key).parent for key in keys}:
        for place in (parent, *parent.parents):
            if meant := _split_meant(place.name):
                inside[place.parent].setdefault(meant, place.name)
    for place, found in sorted(inside.items()):
        if "train" in found and len(found) > 1:
            names = ", ".join(found[split] for split in SPLITS if split in found)
            raise DataError(
                "contains folders that look like splits, and all would be trained on",
                path=folder / place,
                found=names,
                remedy=f"give this folder as `data.folder`, or move them out of {folder}",
            )


def _report_skipped(folder: Path, skipped: Counter[str], report: Report) -> None:
    if text := skipped_text(skipped):
        report(Notice(f"{folder}: {text}"))


def _report_unused(folder: Path, splits: Mapping[str, _Split], found: Mapping[str, ImageSet], report: Report) -> None:
    """Report splits that are not used, and two splits that are one folder."""
    for name, images in found.items():
        if not len(images):
            report(Notice(f"{folder / name}: contains no images"))
    val, test = found.get("val"), found.get("test")
    if test is not None and len(test) and val is not None and len(val) and val.labels is None:
        report(Notice(f"{folder / 'val'}: has test/ beside it and no class folders, so its images are not used"))
    first: dict[str, str] = {}
    for name, split in splits.items():
        other = first.setdefault(os.path.realpath(split.folder), name)
        if other != name:
            report(Notice(f"{folder}: {other} and {name} are the same folder by a link, so they hold the same images"))


def _no_images(folder: Path, skipped: Counter[str]) -> DataError:
    text = skipped_text(skipped)
    return DataError(
        f"contains no images ({text})" if text else "contains no images",
        path=folder,
        remedy=f"comkd reads {', '.join(sorted(SUFFIXES))}",
    )


def _no_classes(folder: Path) -> DataError:
    return DataError(
        "the images have no classes",
        path=folder,
        remedy="give `data.classes` (a list, or a text file with a name on each line), or sort them into train/ and "
        "test/ with a sub-folder for each class",
    )


def _files(folder: Path, skipped: Counter[str]) -> list[str]:
    """The names of the images directly in a folder, sorted; other files are counted in `skipped`."""
    images = []
    for entry in _entries(folder):
        if entry.is_dir() or is_junk(entry.name):
            continue
        if is_image(entry.name):
            images.append(entry.name)
        else:
            skipped[suffix_of(entry.name)] += 1
    return images


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir() and not is_junk(entry.name)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name. Raises DataError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    """A folder that could not be listed would silently make the dataset smaller."""
    raise DataError("could not be read", path=error.filename, found=error.strerror) from error
