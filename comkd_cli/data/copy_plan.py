"""Whether the crops of a recipe are cut from copies, of what size, and how much space they may take."""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from comkd_cli.data.copies import FOLDER, HEADER, UNFINISHED, Copies, copy_size
from comkd_cli.data.originals import has_files, open_original, originals_of
from comkd_cli.data.source import ImageSet, evenly_spaced
from comkd_cli.edge.images import CONVERSION, UnreadableImage, known_formats
from comkd_cli.events import Notice, Report
from comkd_cli.recipe.model import Data
from comkd_cli.runtime import ranks

SAMPLE = 256  # images whose headers are read
LEAST_LARGE = 128  # pixels on the short side, up to which decoding an image takes a fraction of a millisecond
LARGER_SHARE = 0.1  # of the sample, from which `auto` keeps copies
MOST_BYTES = 100 * 10**9  # of all copies below a folder of runs
MOST_OF_FREE = 0.5  # of the free space: checkpoints, caches and students need some, too
LEFTOVER_SECONDS = 3600


@dataclass(frozen=True)
class CopyPlan:
    """The copies that a set of training images gets."""

    short_side: int
    """Of each copy, in pixels."""
    bytes_per_image: float
    """Of a copy, the mean over a sample."""

    def size_bytes(self, images: int) -> float:
        """Of the copies of this many images, as estimated from the sample."""
        return images * self.bytes_per_image

    def text(self, images: int, folder: Path) -> str:
        """The size of the copies and the space that they need, in one line."""
        size = self.size_bytes(images)
        return f"short side {self.short_side} pixels, about {size / 1e6:,.1f} MB for {images:,} images in {folder}"


def short_side_of_crops(input_size: int, min_scale: float) -> int:
    """ceil(input / sqrt(min_scale)), in pixels.

    Of a square image with this side, the smallest square crop has the size of the input: no crop is enlarged that was
    not enlarged before.
    """
    return math.ceil(input_size / math.sqrt(min_scale))


def plan_copies(images: ImageSet, data: Data, input_size: Callable[[], int], min_scale: float) -> CopyPlan | None:
    """The copies that a recipe's crops of these images are cut from; None if they are cut from the images.

    input_size: returns the larger input of the models that see the crops, in pixels. Reads the headers of SAMPLE
    images. The same images always have the same plan, since it is a part of what identifies a run.
    """
    if data.resized == "off" or (data.resized == "auto" and data.dataset is not None) or not has_files(images):
        return None
    if images.conversion != CONVERSION:  # copies are upright and on white
        return None
    short_side = short_side_of_crops(input_size(), min_scale) if data.resized == "auto" else data.resized
    assert isinstance(short_side, int)  # the recipe has one of the three
    sizes = list(_sizes(images))
    larger = sum(min(size) > max(short_side, LEAST_LARGE) for size in sizes)
    if data.resized == "auto" and (not larger or larger < LARGER_SHARE * len(sizes)):
        return None
    copied = [math.prod(copy_size(size, short_side)) * 3 + HEADER.size for size in sizes]
    return CopyPlan(short_side, sum(copied) / max(1, len(copied)))


def with_copies(images: ImageSet, plan: CopyPlan | None, data: Data, runs: Path, report: Report) -> ImageSet:
    """The images with the copies of a plan, below RUNS/resized; how many exist and what all take is reported.

    All copies together take at most MOST_BYTES and, when they are begun, half of the free space. If that is too
    little for all of them, the other images are decoded in each epoch; the crops are the same.
    """
    if plan is None:
        return images
    originals = originals_of(images, data.fingerprint)
    assert originals is not None  # plan_copies made sure that there are files
    copies = Copies(
        runs / FOLDER / str(plan.short_side), plan.short_side, originals, most_pixels=data.image_limit_pixels
    )
    stored = Stored.below(runs / FOLDER)
    existing = sum(copies.path(originals.key(index)) in stored.files for index in range(len(images)))
    missing = len(images) - existing
    share = min(1.0, stored.allowed_bytes / max(1.0, plan.size_bytes(missing)))
    report(Notice(f"resized copies: {existing:,} of {len(images):,} made; {plan.text(len(images), copies.folder)}"))
    if missing and share < 1:
        report(
            Notice(
                f"resized copies: there is space for about {share:.0%} of the {missing:,} missing ones; the other "
                f"images are decoded in each epoch. Delete folders in {runs / FOLDER}, or free space"
            )
        )
    return replace(images, copies=replace(copies, share=share))


@dataclass(frozen=True)
class Stored:
    """What a folder of copies holds."""

    files: frozenset[Path]
    size_bytes: int
    free_bytes: int
    """On its file system."""

    @property
    def allowed_bytes(self) -> float:
        """Space for copies in addition to those that it holds."""
        return max(0.0, min(MOST_BYTES - self.size_bytes, self.free_bytes * MOST_OF_FREE))

    @staticmethod
    def below(folder: Path) -> Stored:
        """Look at a folder; the main process removes what killed processes left in it."""
        files, total = [], 0
        for entry in _files_below(folder):
            try:
                state = entry.stat()
                if not entry.name.startswith(UNFINISHED):
                    files.append(Path(entry.path))
                    total += state.st_size
                elif ranks.is_main() and time.time() - state.st_mtime > LEFTOVER_SECONDS:
                    Path(entry.path).unlink()
            except OSError:  # removed in the meantime
                continue
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        return Stored(frozenset(files), total, shutil.disk_usage(existing).free)


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The files of folder/SHORT_SIDE/XX/."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # there is none, or it was removed
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(Path(entry.path))
        else:
            yield entry


def _sizes(images: ImageSet) -> Iterator[tuple[int, int]]:
    """Width and height of a sample of the images, without those that could not be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of sizes and metadata
        for index in evenly_spaced(images, SAMPLE):
            try:
                with open_original(images, index) as file, Image.open(file, formats=known_formats()) as opened:
                    yield opened.size
            except (UnreadableImage, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue  # named when the image is decoded
