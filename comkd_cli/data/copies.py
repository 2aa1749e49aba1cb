"""Copies of training images, decoded once and kept as raw pixels that crops are cut from.

A copy is a function of the image file's content and of the short side alone, and a crop is always cut from the copy,
whether that was made a moment ago or read back. So a run has the same bits with no copies at first, with all of them,
with a part where space is short, and where they are deleted while it trains.

Raw pixels, since a crop takes 2 ms from them and 4 to 9 ms from JPEG, WebP or PNG files of the same copy, and since no
second compression changes them (docs/performance.md has the figures).
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import uuid
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from comkd_cli.data.named_bytes import NamedBytes
from comkd_cli.edge.images import MOST_PIXELS, ORIENTATION, check_size, open_image

FOLDER = "resized"
"""Of all copies, below the folder of runs."""
HEADER = struct.Struct("<8s5I")
"""MAGIC, width and height of the original, width and height of the copy, CRC-32 of the pixels that follow."""
MAGIC = b"comkd/1\0"
UNFINISHED = ".unfinished."
# An image of up to this many times the short side keeps its own size: resizing it would take as long as decoding it,
# and would save at most 5/9 of the space.
KEPT_WHOLE = 1.5
# The short side that libjpeg decodes a photo to, at least, in units of the copy's: with 2 instead, crops are nearer to
# those of the whole image by 0.1 of 255 levels, and a photo of 12 megapixels for crops of 8 % takes twice as long.
DECODED = 1.5
JPEG_FACTORS = (8, 4, 2)  # that libjpeg decodes at, and Pillow's draft mode offers
TURNED = range(5, 9)  # EXIF orientations that swap width and height
LEAST_FREE_BYTES = 2 << 30  # on the file system of the copies, below which none is written
KEY_BYTES = 16


class Originals(Protocol):
    """The files of a set of images, by position."""

    def key(self, index: int) -> bytes:
        """16 bytes that identify what an image contains: equal keys, equal pixels."""
        ...

    def read(self, index: int) -> NamedBytes:
        """An image's file. Raises UnreadableImage."""
        ...

    def has_key(self, index: int, content: bytes) -> bool:
        """Whether a file's content is the one that its key was made of: it may have been replaced since."""
        ...


@dataclass(frozen=True, eq=False)
class Copy:
    """The pixels that crops of an image are cut from."""

    size: tuple[int, int]
    """Width and height of the original, upright."""
    pixels: np.ndarray
    """uint8 (height, width, 3)."""

    @property
    def is_whole(self) -> bool:
        """Whether it has the size of the original."""
        return self.pixels.shape[1::-1] == self.size

    def part(self, region: tuple[int, int, int, int]) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """The smallest part of whole pixels that holds a region of the original, and where the region lies in it.

        region: top, left, height and width, as torchvision's transforms return it. Returns uint8 (height, width, 3),
        and left, top, right and bottom in pixels of the part, as Pillow's `resize` accepts them.
        """
        top, left, height, width = region
        rows, columns = self.pixels.shape[:2]
        x, y = columns / self.size[0], rows / self.size[1]
        right, bottom = min((left + width) * x, columns), min((top + height) * y, rows)
        first_column, first_row = int(left * x), int(top * y)
        part = self.pixels[first_row : math.ceil(bottom), first_column : math.ceil(right)]
        return part, (left * x - first_column, top * y - first_row, right - first_column, bottom - first_row)


@dataclass(frozen=True)
class Copies:
    """The copies of a set of images: read, and written if they are missing.

    Any number of processes may use a folder at the same time: a copy appears whole, and all write the same one.
    """

    folder: Path
    """Of all copies with this short side."""
    short_side: int
    originals: Originals
    share: float = 1.0
    """Of the images, whose copies are kept; those of the others are made each time."""
    most_pixels: int = MOST_PIXELS
    """Of an image; see `open_image`."""

    def open(self, index: int) -> Copy:
        """The copy of the image at a position. Raises UnreadableImage if there is none and the image is damaged."""
        key = self.originals.key(index)
        path = self.path(key)
        found = _read(path)
        if found is not None and math.prod(found.size) <= self.most_pixels:  # it may be of a run with another limit
            return found
        file = self.originals.read(index)
        copy = make_copy(file, self.short_side, self.most_pixels)
        if self._is_kept(key) and self.originals.has_key(index, file.getvalue()):
            _write(path, copy)
        return copy

    def path(self, key: bytes) -> Path:
        """The file of the copy with a key."""
        name = key.hex()
        return self.folder / name[:2] / name

    def _is_kept(self, key: bytes) -> bool:
        # Not the first bytes, by which images are held out.
        return int.from_bytes(key[KEY_BYTES - 8 : KEY_BYTES], "big") < self.share * 2**64


def make_copy(file: NamedBytes, short_side: int, most_pixels: int = MOST_PIXELS) -> Copy:
    """The copy of an image file: RGB and upright, as `open_image` returns it. Raises UnreadableImage.

    A JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves DECODED times the short side.
    """
    drafted: list[tuple[int, int]] = []

    def draft(opened: Image.Image) -> None:
        width, height = opened.size
        check_size(width, height, most_pixels)  # of the file, not of what it is decoded to
        factor = next((f for f in JPEG_FACTORS if min(width, height) >= f * DECODED * short_side), 1)
        if opened.format in ("JPEG", "MPO") and factor > 1:
            opened.draft(None, (width // factor, height // factor))
            drafted.append((height, width) if _is_turned(opened) else (width, height))

    image = open_image(file, most_pixels, draft)
    size = drafted[0] if drafted else image.size
    return Copy(size, np.array(_reduced(image, size, short_side)))


def copy_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Width and height of the copy of an image with this width and height."""
    width, height = size
    if min(size) <= KEPT_WHOLE * short_side:
        return size
    if width <= height:
        return short_side, round(short_side * height / width)
    return round(short_side * width / height), short_side


def _reduced(image: Image.Image, size: tuple[int, int], short_side: int) -> Image.Image:
    target = copy_size(size, short_side)
    if target == size:
        return image
    # Of Pillow's filters Lanczos leaves the smallest differences; the gap saves most of its time on large images.
    return image.resize(target, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) in TURNED
    except Exception:  # of damaged EXIF data, which are ignored when the image is turned, too
        return False


def _read(path: Path) -> Copy | None:
    """The copy in a file; None if there is none, or not a whole one."""
    try:
        with path.open("rb", buffering=0) as file:
            content = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
            if file.readinto(content.data) != len(content) or len(content) < HEADER.size:
                return None
    except OSError:
        return None
    magic, width, height, columns, rows, checksum = HEADER.unpack(content[: HEADER.size].tobytes())
    pixels = content[HEADER.size :]
    # A copy is not synced when it is written, so it may be incomplete after a power failure.
    if magic != MAGIC or len(pixels) != columns * rows * 3 or zlib.crc32(pixels.data) != checksum:
        return None
    return Copy((width, height), pixels.reshape(rows, columns, 3))


def _write(path: Path, copy: Copy) -> None:
    """Write a copy unless the disk is full: without it the image is decoded again."""
    rows, columns = copy.pixels.shape[:2]
    header = HEADER.pack(MAGIC, *copy.size, columns, rows, zlib.crc32(copy.pixels.data))
    unfinished = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < LEAST_FREE_BYTES + copy.pixels.nbytes:
            return
        with unfinished.open("xb") as file:
            file.write(header)
            file.write(copy.pixels.data)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
