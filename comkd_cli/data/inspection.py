"""What a folder of images holds, by names, sizes and the headers of a sample: enough to propose a recipe for it."""

from __future__ import annotations

import os
import stat
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from comkd_cli.data.class_names import class_key, clean_name, read_class_names, some
from comkd_cli.data.contents import NO_REGULAR_FILE
from comkd_cli.data.folder import folder_source
from comkd_cli.data.image_files import find_images, is_junk, suffix_of
from comkd_cli.data.same_files import same_contents
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.split_names import SPLITS
from comkd_cli.edge.images import FORMATS, MOST_PIXELS, check_size, known_formats
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice, Report, ignore_event
from comkd_cli.recipe.model import DEFAULT_TEMPLATE

SAMPLE_SIZE = 256  # images whose headers are read
LONG_SHAPE = 4  # long side over short side from which a centre crop shows a quarter of the picture or less
TAIL_BYTES = 65_536  # of a JPEG or PNG file, in which the mark of its end is looked for


@dataclass(frozen=True)
class InspectedFile:
    """An image file of the folder."""

    path: str
    """Text, not a Path: creating so many Paths takes longer than the stat calls."""
    split: str
    """`train`, `val` or `test`; `train` for a folder without splits."""
    class_name: str | None


@dataclass(frozen=True)
class Sample:
    """The headers of evenly spaced images, summarised."""

    images: int
    formats: Counter[str]
    """By Pillow's name of the format, whatever the suffix says."""
    short_side: int
    """Median in pixels; 0 if no header could be read."""
    long_side: int
    long_shapes: int
    """Images at least LONG_SHAPE times as long as wide, of which a centre crop shows little."""
    unreadable: tuple[str, ...]
    """`path: reason` of files whose header could not be read."""
    truncated: tuple[str, ...]
    """JPEG and PNG files without the mark of their end."""


@dataclass(frozen=True)
class Duplicates:
    """Files with the same bytes."""

    copies: int
    """Files beyond the first of each content."""
    across_splits: tuple[tuple[str, str], ...]
    """For each image of val/ or test/ that is also in train/: its path and the one in train/."""
    across_classes: tuple[tuple[str, str], ...]
    """Pairs with the same content and different labels."""


@dataclass(frozen=True)
class Inspection:
    """What a folder holds."""

    folder: Path
    source: Source
    listed_classes: tuple[str, ...] | None
    """The names to write into a recipe, if neither a file nor every split has all of them."""
    suffixes: Counter[str]
    total_bytes: int
    missing: tuple[str, ...]
    """`path: reason` of files that are empty or cannot be opened at all; every file was checked."""
    sample: Sample
    duplicates: Duplicates
    untrained_classes: tuple[str, ...]
    """Classes without a training image, if the training images have labels."""
    notes: tuple[str, ...]
    """What reading the folder reported, such as files that are skipped."""


def inspect_folder(folder: Path, classes: Path | None = None, report: Report = ignore_event) -> Inspection:
    """Look at a folder of images as `data.folder` of a recipe would read it.

    classes: a text file of class names, one a line. Sizes of all files and headers of a sample are read, and files of
    the same size are compared by a digest; nothing is decoded. Raises DataError for a folder that a recipe could not
    use, with the remedy, and for fewer than two training images.
    """
    notes: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Notice):
            notes.append(event.text)

    names = read_class_names(classes) if classes is not None else None
    listed = None if classes is not None else _classes_of_differing_splits(folder)
    if names is None and listed is None:
        _check_class_folders(folder)
    source = folder_source(folder, names or listed, DEFAULT_TEMPLATE, note)
    if len(source.train) < 2:
        raise DataError(
            "has too few training images",
            path=folder,
            found=len(source.train),
            remedy="put them in train/, or all images in a folder without train/, val/ and test/",
        )
    files = list(_files(folder, source))
    sizes, missing = _sizes(files)
    return Inspection(
        folder=folder,
        source=source,
        listed_classes=listed,
        suffixes=Counter(suffix_of(os.path.basename(file.path)) for file in files),  # noqa: PTH119
        total_bytes=sum(sizes),
        missing=missing,
        sample=_sample(files),
        duplicates=_duplicates(files, sizes, report),
        untrained_classes=_untrained_classes(source),
        notes=tuple(notes),
    )


def _classes_of_differing_splits(folder: Path) -> tuple[str, ...] | None:
    """All class folders' names, sorted, if a split lacks some that another one has; None if all have the same."""
    of_split = [_class_folders(folder / split) for split in SPLITS if (folder / split).is_dir()]
    keys = [{class_key(name) for name in names} for names in of_split if names]
    if len(keys) < 2 or all(found == keys[0] for found in keys):
        return None
    every = {class_key(name): clean_name(name, str(folder), "the folder name") for names in of_split for name in names}
    return tuple(sorted(every.values()))


def _check_class_folders(folder: Path) -> None:
    """Refuse images in class folders beside one another, with the remedy: they would pass for unlabelled ones."""
    if not folder.is_dir() or any((folder / split).is_dir() for split in SPLITS):
        return
    names = [name for name in _class_folders(folder) if next(find_images(folder / name), None) is not None]
    if len(names) >= 2:
        raise DataError(
            "there is no train/ folder, so the sub-folders are not used as classes",
            path=folder,
            found=some(names),
            remedy=f"move these folders into {folder / 'train'}, or name the classes with --classes FILE, one a line",
        )


def _class_folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not is_junk(entry.name))
    except OSError as error:
        raise DataError(f"could not be read: {error.strerror}", path=error.filename) from error


def _files(folder: Path, source: Source) -> Iterator[InspectedFile]:
    sets = [(source.train, "train"), (source.test, "test"), (source.val, "val")]
    for images, split in sets:
        if images is None:
            continue
        root = _root(images)
        where = root.name if root != folder and root.name in SPLITS else split  # val/ is the test set without test/
        for i, key in enumerate(images.keys):
            label = None if images.labels is None else images.labels[i]
            path = os.path.join(root, key)  # noqa: PTH118
            yield InspectedFile(path, where, None if label is None else source.class_names[label])


def _root(images: ImageSet) -> Path:
    root: Path = images.contents.root  # type: ignore[union-attr]  # folder_source's sets are files below a folder
    return root


def _sizes(files: Sequence[InspectedFile]) -> tuple[list[int], tuple[str, ...]]:
    """The size of each file, 0 if there is none, and what is wrong with those."""
    sizes, missing = [], []
    for file in files:
        size, problem = 0, "is empty"
        try:
            state = os.stat(file.path)  # noqa: PTH116
            size = state.st_size if stat.S_ISREG(state.st_mode) else 0
            problem = problem if stat.S_ISREG(state.st_mode) else NO_REGULAR_FILE
        except OSError as error:
            problem = error.strerror or type(error).__name__
        sizes.append(size)
        if not size:
            missing.append(f"{file.path}: {problem}")
    return sizes, tuple(missing)


def _untrained_classes(source: Source) -> tuple[str, ...]:
    if source.train.labels is None:
        return ()
    present = set(source.train.labels)
    return tuple(name for label, name in enumerate(source.class_names) if label not in present)


# --- headers ---------------------------------------------------------------------------------------------


def _sample(files: Sequence[InspectedFile]) -> Sample:
    step = max(1, len(files) // SAMPLE_SIZE)
    chosen = files[::step][:SAMPLE_SIZE]
    formats: Counter[str] = Counter()
    sides, unreadable, truncated = [], [], []
    for file in chosen:
        header = _read_header(file.path)
        if isinstance(header, str):
            unreadable.append(f"{file.path}: {header}")
            continue
        kind, width, height = header
        formats[kind] += 1
        sides.append((min(width, height), max(width, height)))
        if kind in END_MARKS and not _is_complete(file.path, kind):
            truncated.append(file.path)
    return Sample(
        images=len(chosen),
        formats=formats,
        short_side=int(statistics.median(short for short, _ in sides)) if sides else 0,
        long_side=int(statistics.median(long for _, long in sides)) if sides else 0,
        long_shapes=sum(long >= LONG_SHAPE * short for short, long in sides),
        unreadable=tuple(unreadable),
        truncated=tuple(truncated),
    )


def _read_header(path: str) -> tuple[str, int, int] | str:
    """Format, width and height of an image, or why its header cannot be read."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # opening a pipe waits for ever
            return NO_REGULAR_FILE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=known_formats()) as image:
                kind, (width, height) = str(image.format), image.size
    except FileNotFoundError as error:
        return str(error.strerror)
    except UnidentifiedImageError:
        return f"is not a readable image; the supported formats are {', '.join(FORMATS)}"
    except Exception as error:  # decoders by many authors, each with errors of its own
        return " ".join(str(error).split()) or type(error).__name__
    try:
        check_size(width, height, MOST_PIXELS)
    except ValueError as error:
        return str(error)
    return kind, width, height


# For each format what begins its last part, and what ends that part.
END_MARKS = {"JPEG": (b"\xff\xda", b"\xff\xd9"), "MPO": (b"\xff\xda", b"\xff\xd9"), "PNG": (b"IDAT", b"IEND")}


def _is_complete(path: str, kind: str) -> bool:
    """Whether a file's last part is ended. Compressed data cannot hold a JPEG's marks; a thumbnail's come before."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
    except OSError:
        return False
    last, end = END_MARKS[kind]
    return tail.rfind(end) > tail.rfind(last)


# --- files with the same content -------------------------------------------------------------------------


def _duplicates(files: Sequence[InspectedFile], sizes: Sequence[int], report: Report) -> Duplicates:
    copies = 0
    across_splits: list[tuple[str, str]] = []
    across_classes: list[tuple[str, str]] = []
    for group in same_contents([file.path for file in files], sizes, report):
        copies += len(group) - 1
        members = [files[i] for i in group]
        trained = next((file for file in members if file.split == "train"), None)
        if trained is not None:
            across_splits += [(file.path, trained.path) for file in members if file.split != "train"]
        labelled = [file for file in members if file.class_name is not None]
        across_classes += [
            (file.path, labelled[0].path) for file in labelled[1:] if file.class_name != labelled[0].class_name
        ]
    return Duplicates(copies, tuple(across_splits), tuple(across_classes))
