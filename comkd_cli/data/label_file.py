"""labels.csv: the labels of some training images of a folder, by their paths."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from comkd_cli.data.class_names import class_key, clean_name, some
from comkd_cli.errors import DataError
from comkd_cli.recipe.data import UNLABELLED

COLUMNS = ("path", "class")


@dataclass(frozen=True)
class Row:
    """A line of the file after its header."""

    line: int
    """From 1; of a row of several lines, the last."""
    image: str
    """The path as the file writes it."""
    class_name: str
    """As prompts use it."""


@dataclass(frozen=True)
class LabelFile:
    """A file with the columns `path` and `class`, checked as far as that is possible without the images."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def class_names(self) -> list[str]:
        """The classes of the file, sorted; if a class has several spellings, the first."""
        first: dict[str, str] = {}
        for row in self.rows:
            first.setdefault(class_key(row.class_name), row.class_name)
        return sorted(first.values())

    def labels(self, folder: Path, images: Sequence[str], classes: Sequence[str], scored: Sequence[str]) -> Labelling:
        """The label of each training image.

        folder: that paths count from, beside the file's own. images, scored: the paths of the training images, and of
        those that have their labels from elsewhere, below the folder. classes: the names in label order. Raises
        DataError, with the line, for a path that names none of the images or two of them, for a class that is not among
        `classes`, and for an image with two classes.
        """
        label_of = {class_key(name): label for label, name in enumerate(classes)}
        resolver = _Resolver(self.path, folder, {*images, *scored})
        training = set(images)
        found: dict[str, Row] = {}
        unused = []
        for row in self.rows:
            image = resolver.image_of(row)
            if image not in training:
                unused.append(image)
                continue
            if class_key(row.class_name) not in label_of:
                raise DataError(
                    "the class is not in the class list",
                    path=self.path,
                    field=f"line {row.line}",
                    found=row.class_name,
                    allowed=some(classes),
                    remedy="correct the name, or add it to `data.classes`",
                )
            earlier = found.setdefault(image, row)
            if class_key(earlier.class_name) != class_key(row.class_name):
                raise DataError(
                    f"assigns {row.image} a different class from line {earlier.line}",
                    path=self.path,
                    field=f"line {row.line}",
                    found=f"{earlier.class_name}, {row.class_name}",
                    remedy="remove one of the two lines",
                )
        by_image = {image: label_of[class_key(row.class_name)] for image, row in found.items()}
        return Labelling(tuple(by_image.get(image, UNLABELLED) for image in images), len(unused))


@dataclass(frozen=True)
class Labelling:
    """The labels that a file assigns to the images of a folder."""

    labels: tuple[int, ...]
    """For each training image the index of its class, or UNLABELLED."""
    unused: int
    """Lines that name images of test/ or val/."""


class _Resolver:
    """Finds the image that a path means."""

    def __init__(self, path: Path, folder: Path, images: set[str]) -> None:
        """path: of the file. images: relative to the folder, with `/` separators."""
        self._path, self._folder, self._images = path, folder.resolve(), images
        self._bases = (self._folder, path.parent.resolve())
        self._starts = (self._folder, folder.absolute())  # they differ if absolute paths lead through a link

    def image_of(self, row: Row) -> str:
        """The image, relative to the folder. Raises DataError if the path names none, or two."""
        pairs = product(self._bases, self._starts)
        candidates = {os.path.relpath(base / row.image, start) for base, start in pairs}
        found = {Path(candidate).as_posix() for candidate in candidates} & self._images
        if len(found) == 1:
            return found.pop()
        if found:
            problem = "the path matches two images, one relative to the image folder and one relative to this file"
            remedy = f"write an absolute path, or move this label file into {self._folder}"
        else:
            problem = f"the path is not an image in {self._folder}"
            remedy = "write it relative to the folder of images, or remove the line"
        raise DataError(
            problem,
            path=self._path,
            field=f"line {row.line}",
            found=", ".join(sorted(found)) or row.image,
            remedy=remedy,
        )


def read_label_file(path: Path) -> LabelFile:
    """Read the file: CSV with a header, UTF-8 with or without a byte order mark; other columns are ignored.

    Raises DataError, with the line, for text that is not CSV, for a header without both columns, and for a row without
    a path or with a class name that cannot be used.
    """
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, reader.fieldnames or ())
            line = 1
            reader.fieldnames = [name.strip().casefold() for name in reader.fieldnames or ()]
            rows = []
            for fields in reader:
                line = reader.line_num
                rows.append(_row(path, line, fields))
    except csv.Error as error:
        raise DataError(
            "is not valid CSV", path=path, field=f"line {line + 1}", found=str(error), remedy="correct the line"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        remedy = "check that it is a file that you may read" if isinstance(error, OSError) else "save it as UTF-8 text"
        raise DataError("the labels could not be read", path=path, found=str(error), remedy=remedy) from error
    if not rows:
        raise DataError("names no image", path=path, remedy="add a line for each labelled image: path,class")
    return LabelFile(path, tuple(rows))


def _check_header(path: Path, names: Sequence[str]) -> None:
    found = [name.strip().casefold() for name in names]
    if any(found.count(column) != 1 for column in COLUMNS):
        raise DataError(
            "the header should name each of the columns once",
            path=path,
            field="line 1",
            found=",".join(names) or "nothing",
            allowed=COLUMNS,
            remedy="begin the file with the line path,class",
        )


def _row(path: Path, line: int, fields: Mapping[str | None, str | list[str] | None]) -> Row:
    image, name = (fields.get(column) for column in COLUMNS)
    extra = fields.get(None) or ()
    if extra or not isinstance(image, str) or not isinstance(name, str) or not image.strip():
        raise DataError(
            "should have a path and a class",
            path=path,
            field=f"line {line}",
            found=",".join([*(value for value in fields.values() if isinstance(value, str)), *extra]),
            remedy='write path,class; put a value with a comma in double quotes: "a,b.png"',
        )
    return Row(line, image.strip(), clean_name(name, path, f"line {line}"))
