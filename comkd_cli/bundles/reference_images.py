"""The eight images of a bundle's reference/: together they reach every step from a file to a tensor.

They are computed here with integer arithmetic, so their pixels are the same everywhere and nobody else has rights in
them. Each has sharp edges and fine texture, on which another filter or order of steps is seen.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

LICENSE = "CC0-1.0"
ORIENTATION = 0x0112  # the EXIF tag
QUARTER_TURN = 6  # shown turned clockwise by 90 degrees
PALETTE_LEVELS = 6  # of each channel: a palette of 216 colours


@dataclass(frozen=True)
class ReferenceImage:
    """An image file."""

    name: str
    suffix: str
    shows: str
    """What a reader may get wrong."""
    lossless: bool
    content: bytes

    @property
    def file(self) -> str:
        """Its file name."""
        return f"{self.name}.{self.suffix}"


@cache
def reference_images() -> tuple[ReferenceImage, ...]:
    """The images, always in the same order and with the same pixels."""
    return (
        _png(
            "odd", "odd sides that are not multiples of a patch or an input size", Image.fromarray(_scene(253, 227, 1))
        ),
        _png("portrait", "taller than wide: the crop is vertical", Image.fromarray(_scene(171, 307, 2))),
        _rotated(),
        _png("grey", "one channel", Image.fromarray(_grey(_scene(243, 181, 4)))),
        _palette(),
        _cmyk(),
        _png("deep", "16-bit grey, of which only the high byte counts", Image.fromarray(_sixteen_bits(233, 197))),
        _photo(),
    )


def _scene(width: int, height: int, seed: int, colour: int = 8) -> np.ndarray:
    """Soft hills of several sizes, a bright disc, stripes and fine texture, uint8 (height, width, 3).

    colour: eighths of the hills that each channel has for itself; photos have few.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.int32)
    channels = []
    fine = _hills(x, y, 2, 7 * seed)
    common = 2 * _hills(x, y, 64, 5 * seed) + _hills(x, y, 16, 11 * seed)
    for channel in range(3):
        own = 2 * _hills(x, y, 64, 3 * seed + channel) + _hills(x, y, 16, 99 * seed + channel)
        noise = (colour * own + (8 - colour) * common) // 2 + 2 * fine
        disc = (x - width // 3) ** 2 + (y - height // 3) ** 2 < (min(width, height) // 5) ** 2
        stripes = (y > 2 * height // 3) & ((x + y) // 5 % 2 == 0)
        level = noise // 14 + np.where(disc, 90 - 40 * channel, 0) + np.where(stripes, 50 * channel - 60, 0)
        channels.append(np.clip(level, 0, 255))
    return np.stack(channels, axis=2).astype(np.uint8)


def _hills(x: np.ndarray, y: np.ndarray, cell: int, seed: int) -> np.ndarray:
    """Levels from 0 to 255, random at the corners of square cells and bilinear within them."""
    column, right = x // cell, x % cell
    row, down = y // cell, y % cell
    corners = _random(int(column.max()) + 2, int(row.max()) + 2, seed)
    above = (cell - right) * corners[row, column] + right * corners[row, column + 1]
    below = (cell - right) * corners[row + 1, column] + right * corners[row + 1, column + 1]
    return np.asarray(((cell - down) * above + down * below) // cell**2)


def _random(width: int, height: int, seed: int) -> np.ndarray:
    """Levels from 0 to 255, int32 (height, width).

    A hash in 32 bits; numpy's generators may give other numbers in another version.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    mixed = (x * 0x9E3779B1 + y * 0x85EBCA77 + (seed + 1) * 0xC2B2AE3D) & 0xFFFFFFFF
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return np.asarray(mixed >> 24, dtype=np.int32)


def _grey(scene: np.ndarray) -> np.ndarray:
    return np.asarray(scene.astype(np.int64) @ np.array([2, 5, 1]) // 8, dtype=np.uint8)


def _saved(save: Callable[[io.BytesIO], None]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def _png(name: str, shows: str, image: Image.Image) -> ReferenceImage:
    return ReferenceImage(name, "png", shows, True, _saved(lambda file: image.save(file, "PNG", optimize=True)))


def _rotated() -> ReferenceImage:
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    image = Image.fromarray(_scene(280, 210, 3))
    content = _saved(lambda file: image.save(file, "JPEG", quality=92, subsampling=0, exif=exif))
    return ReferenceImage(
        "rotated", "jpg", "must be rotated by its EXIF orientation, as phones write it", False, content
    )


def _palette() -> ReferenceImage:
    scene = _scene(205, 219, 5)
    red, green, blue = (scene.astype(np.int64) * PALETTE_LEVELS // 256).transpose(2, 0, 1)
    image = Image.fromarray(((red * PALETTE_LEVELS + green) * PALETTE_LEVELS + blue).astype(np.uint8))
    steps = [255 * level // (PALETTE_LEVELS - 1) for level in range(PALETTE_LEVELS)]
    image.putpalette([level for r in steps for g in steps for b in steps for level in (r, g, b)])
    alpha = bytes(255 - 40 * (index % PALETTE_LEVELS) for index in range(PALETTE_LEVELS**3))
    content = _saved(lambda file: image.save(file, "PNG", optimize=False, transparency=alpha))
    return ReferenceImage("palette", "png", "a palette with its own alpha: composited on white", True, content)


def _cmyk() -> ReferenceImage:
    scene = _scene(167, 149, 6)
    black = 255 - scene.max(axis=2, keepdims=True)
    inks = np.concatenate([255 - scene - black // 2, black // 2], axis=2)
    image = Image.frombytes("CMYK", (scene.shape[1], scene.shape[0]), np.ascontiguousarray(inks).tobytes())
    content = _saved(lambda file: image.save(file, "TIFF"))
    return ReferenceImage("cmyk", "tif", "the four inks of printing", True, content)


def _sixteen_bits(width: int, height: int) -> np.ndarray:
    """uint16 (height, width), whose low bytes would turn the high ones if they were rounded."""
    grey = _grey(_scene(width, height, 7)).astype(np.uint16)
    return grey * 256 + np.where(np.arange(width) % 2, 255, 0).astype(np.uint16)


def _photo() -> ReferenceImage:
    image = Image.fromarray(_scene(512, 384, 8, colour=2))
    content = _saved(lambda file: image.save(file, "JPEG", quality=85, subsampling=2))
    return ReferenceImage("photo", "jpg", "an 8-bit JPEG, 4:2:0, larger than the input", False, content)
