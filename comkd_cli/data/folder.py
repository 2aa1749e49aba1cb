"""A user's own folder of images as a source: unlabelled, or train/ and test/ with a sub-folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from comkd_cli.data.class_names import class_key, clean_class_names, clean_name, some
from comkd_cli.data.contents import NO_REGULAR_FILE, FileContents
from comkd_cli.data.image_files import SUFFIXES, find_images, image_names, skipped_text, subfolders_of, suffix_of
from comkd_cli.data.label_file import LabelFile
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.split_names import SPLITS, check_split_names, check_splits_further_down
from comkd_cli.edge.images import CONVERSION, Conversion, UnreadableImage, open_image
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report
from comkd_cli.recipe.data import UNLABELLED

# Sub-folders of train/ that are not classes unless the recipe's class list has the name.
UNLABELLED_FOLDERS = frozenset({"unlabelled", "unlabeled"})


def folder_source(
    folder: Path,
    classes: Sequence[str] | None,
    template: str,
    report: Report = lambda event: None,
    labels: LabelFile | None = None,
) -> Source:
    """The images below a folder.

    With train/, val/ or test/ in it, those are the splits, and their sub-folders, named after the classes, determine
    the labels; without test/, val/ is scored. Images in train/unlabelled/ have no label. Without splits, every image
    anywhere below is unlabelled training data. labels: the only labels of the training images, whatever their
    sub-folders. classes: the names in label order; None uses the sub-folder names, sorted, and with `labels` those of
    the file if val/ and test/ have none. Skipped files are reported. Raises DataError, also for images that are in no
    split.
    """
    if not folder.is_dir():
        raise DataError("no such folder of images", path=folder, remedy="check `data.folder` and --data-root")
    if classes is not None:
        classes = clean_class_names(classes, "data.classes")
    subfolders = subfolders_of(folder)
    check_split_names(folder, subfolders)
    if not any(name in SPLITS for name in subfolders):
        return _without_splits(folder, classes, template, report, labels)
    skipped: Counter[str] = Counter()
    listed = {class_key(name) for name in classes or ()}
    splits = {name: _read_split(folder / name, folder, skipped, listed) for name in SPLITS if name in subfolders}
    if labels is not None and "train" in splits:
        splits["train"] = replace(splits["train"], classes={}, loose=splits["train"].images, unlabelled=())
    stray = _stray_images(folder, subfolders, splits, skipped)
    if not (stray or any(split.images for split in splits.values())):
        raise _no_images(folder, skipped)
    if classes is None and labels is not None and not any(split.classes for split in splits.values()):
        classes = clean_class_names(labels.class_names, labels.path)
    names = tuple(_class_names_of_folders(folder, splits) if classes is None else classes)
    found = {name: _labelled(split, names) for name, split in splits.items()}
    if stray:
        raise DataError(
            f"has splits, but {len(stray)} images are in none of them",
            path=folder,
            found=some(stray),
            remedy="move them into a class folder of train/ or test/, those without a label into train/unlabelled/, or "
            "out of the folder",
        )
    if labels is not None:
        found["train"] = _labelled_by_file(folder, labels, names, found, report)
    _report_skipped(folder, skipped, report, labels)
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


def open_below(
    root: Path,
    key: str,
    most_pixels: int | None = None,
    conversion: Conversion = CONVERSION,
) -> Image.Image:
    """The RGB image at a path below a folder. most_pixels, conversion: see `open_image`. Raises UnreadableImage."""
    path = root / key
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise UnreadableImage(f"{path}: {NO_REGULAR_FILE}")
    return open_image(path, most_pixels, conversion=conversion)


@dataclass(frozen=True)
class _Split:
    """The images of one of train/, val/ and test/."""

    folder: Path
    classes: Mapping[str, Sequence[Path]]
    """By the name of each sub-folder, sorted, the images below it."""
    loose: Sequence[Path]
    """Images directly in the split."""
    unlabelled: Sequence[Path] = ()
    """Images below its folder of unlabelled images."""

    @property
    def images(self) -> list[Path]:
        return [*self.loose, *(path for paths in self.classes.values() for path in paths), *self.unlabelled]


def _without_splits(
    folder: Path, classes: Sequence[str] | None, template: str, report: Report, labels: LabelFile | None
) -> Source:
    skipped: Counter[str] = Counter()
    images = _image_set(folder, list(find_images(folder, skipped)), None)
    if not len(images):
        raise _no_images(folder, skipped)
    if classes is None and labels is not None:
        classes = clean_class_names(labels.class_names, labels.path)
    if classes is None:
        raise _no_classes(folder)
    check_splits_further_down(folder, images.keys)
    _report_skipped(folder, skipped, report, labels)
    if labels is not None:
        images = replace(images, labels=labels.labels(folder, images.keys, classes, ()).labels)
    return Source(folder.resolve().name, tuple(classes), template, images, None)


def _labelled_by_file(
    folder: Path, file: LabelFile, names: Sequence[str], found: Mapping[str, ImageSet], report: Report
) -> ImageSet:
    """The training images with the labels of a file; its lines for images of other splits are reported."""
    keys = {split: [f"{split}/{key}" for key in images.keys] for split, images in found.items()}
    scored = [key for split, below in keys.items() if split != "train" for key in below]
    labelling = file.labels(folder, keys.get("train", ()), names, scored)
    if labelling.unused:
        report(
            Notice(
                f"{file.path}: {labelling.unused:,} lines name images of test/ or val/ and are ignored: the labels of "
                "those images come from their class folders"
            )
        )
    if "train" not in found or all(label == UNLABELLED for label in labelling.labels):
        raise DataError("labels no training image", path=file.path, remedy="add lines for images of train/")
    return replace(found["train"], labels=labelling.labels)


def _read_split(path: Path, root: Path, skipped: Counter[str], listed: Set[str]) -> _Split:
    """One split of the folder `root`. Raises DataError if two class folders are one folder, or one class.

    listed: the keys of the recipe's class list; a class may have the name of the folder of unlabelled images.
    """
    reserved = UNLABELLED_FOLDERS - listed if path.name == "train" else frozenset()
    classes: dict[str, list[Path]] = {}
    unlabelled: list[Path] = []
    real: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for name in subfolders_of(path):
        if class_key(name) in reserved:
            unlabelled += find_images(path / name, skipped, above=(root, path))
            continue
        other = spellings.setdefault(class_key(name), name)
        if other != name:
            raise DataError(
                "has two folders whose names are spellings of the same class",
                path=path,
                found=f"{other}, {name}",
                remedy="merge them",
            )
        other = real.setdefault(os.path.realpath(path / name), name)
        if other != name:
            raise DataError(
                "two class folders are the same folder through a link",
                path=path,
                found=f"{other}, {name}",
                remedy="remove the link: an image has one class",
            )
        classes[name] = list(find_images(path / name, skipped, above=(root, path)))
    return _Split(path, classes, [path / name for name in image_names(path, skipped)], unlabelled)


def _stray_images(
    folder: Path, subfolders: Sequence[str], splits: Mapping[str, _Split], skipped: Counter[str]
) -> list[str]:
    """Paths below a folder with splits, of images that are in none, or beside the class folders of one."""
    stray = [Path(folder / name) for name in image_names(folder, skipped)]
    for name in subfolders:
        if name not in splits:
            stray += find_images(folder / name, skipped, above=(folder,))
        elif splits[name].classes:
            stray += splits[name].loose
    return [path.relative_to(folder).as_posix() for path in stray]


def _labelled(split: _Split, classes: Sequence[str]) -> ImageSet:
    """The images of a split: labelled by its sub-folders, or unlabelled if it has none. Raises DataError."""
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
    paths = [path for of_class in split.classes.values() for path in of_class]
    labels = [label_of[class_key(name)] for name, of_class in split.classes.items() for _ in of_class]
    labels += [UNLABELLED] * len(split.unlabelled)
    return _image_set(split.folder, [*paths, *split.unlabelled], labels if paths else None)


def _image_set(root: Path, paths: Sequence[Path], labels: Sequence[int] | None) -> ImageSet:
    return ImageSet(
        keys=tuple(path.relative_to(root).as_posix() for path in paths),
        labels=None if labels is None else tuple(labels),
        open_key=partial(open_below, root),
        contents=FileContents(root),
    )


def _class_names_of_folders(folder: Path, splits: Mapping[str, _Split]) -> list[str]:
    """The names of all class folders, sorted. Raises DataError if a split lacks one that another has."""
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
                remedy="add them (empty is fine), or set `data.classes`",
            )
    return clean_class_names(sorted(found.values()), folder)


def _report_skipped(folder: Path, skipped: Counter[str], report: Report, labels: LabelFile | None = None) -> None:
    """Report the files that were skipped, without the file of labels, which was read."""
    if labels is not None and labels.path.resolve().is_relative_to(folder.resolve()):
        skipped -= Counter([suffix_of(labels.path.name)])
    if text := skipped_text(skipped):
        report(Notice(f"{folder}: {text}"))


def _report_unused(folder: Path, splits: Mapping[str, _Split], found: Mapping[str, ImageSet], report: Report) -> None:
    """Report splits that are not used, and two splits that are one folder."""
    for name, images in found.items():
        if not len(images):
            report(Notice(f"{folder / name}: contains no images"))
    val, test = found.get("val"), found.get("test")
    if test is not None and len(test) and val is not None and len(val) and val.labels is None:
        report(Notice(f"{folder / 'val'}: is not used, because it has no class folders and test/ has images"))
    first: dict[str, str] = {}
    for name, split in splits.items():
        other = first.setdefault(os.path.realpath(split.folder), name)
        if other != name:
            report(
                Notice(f"{folder}: {other} and {name} are the same folder through a link, so they hold the same images")
            )


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
        remedy="set `data.classes` (a list, or a text file with a name on each line), or sort them into train/ and "
        "test/ with a sub-folder for each class",
    )
