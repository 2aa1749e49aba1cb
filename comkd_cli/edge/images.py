"""Decodes, resizes and normalises images, for training and, as a part of predict.py, on a device."""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MOST_PIXELS = 178_956_970  # of an image that is decoded; Pillow's own limit for a decompression bomb
MOST_ELONGATION = 1000  # longer side by shorter: of a more elongated image the crop would show less than a thousandth
# What is decoded, whatever a file's name says. Pillow knows forty more formats, one of which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "HEIF")
# The largest image that is resized whole; of a larger one only the crop is resized. A strip of 65,000 x 65 pixels,
# resized to 448 pixels on its short side, would take 800 MB, of which the crop shows 0.1 %.
MOST_RESIZED_PIXELS = 2**26
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ORIENTATION = 0x0112  # the EXIF tag
# The transpose that undoes each orientation. Pillow's exif_transpose would also rewrite the EXIF data, which fails if
# any other tag is damaged.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PILLOW_MODULES = r"PIL(\.|$)"
NULL_HANDLER = logging.NullHandler()

ImageSource = str | os.PathLike[str] | IO[bytes] | bytes
"""An image file: its path, an open binary file, or its content."""


class UnreadableImage(Exception):
    """A file that cannot be decoded as an image; the message names it."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: resized, centre-cropped, scaled to 0..1 and normalised."""

    size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """`shortest` resizes the short side and crops the centre; `squash` resizes both sides."""


@dataclass(frozen=True)
class Conversion:
    """How the content of an image file becomes 8-bit RGB; the default is the way a viewer would show it."""

    orient: bool = True
    """Apply the EXIF orientation."""
    alpha: str = "white"
    """`white` composites transparency on white, `drop` keeps the colours as they are stored."""
    grey16: str = "scale"
    """`scale` maps 16-bit grey to 8 bits, `clip` makes every level above 255 white, as Pillow's own conversion does."""


CONVERSION = Conversion()  # the default


def checked_preprocessing(plain: Any) -> Preprocessing:
    """The pre-processing of plain data, such as a manifest's. Raises ValueError, naming the invalid field."""
    try:
        preprocessing = Preprocessing(**plain)
    except TypeError as error:
        raise ValueError(str(error)) from error
    size = preprocessing.size
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size should be a number of pixels, not {size!r}")
    for field in ("mean", "std"):
        values = getattr(preprocessing, field)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise ValueError(f"{field} should be three numbers, not {values!r}")
    for field, allowed in (("interpolation", list(RESAMPLING)), ("resize_mode", ["shortest", "squash"])):
        if (value := getattr(preprocessing, field)) not in allowed:
            raise ValueError(f"{field} should be {' or '.join(allowed)}, not {value!r}")
    return preprocessing


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def open_image(
    file: ImageSource,
    most_pixels: int | None = None,
    before_decoding: Callable[[Image.Image], object] | None = None,
    conversion: Conversion = CONVERSION,
) -> Image.Image:
    """An image file as 8-bit RGB, by default the way a viewer would show it.

    file: a path, an open binary file, or its content as bytes. The EXIF orientation is applied, transparency is
    composited on white, 16-bit grey is scaled to 8 bits, and an animation gives its first frame. Pillow's warnings are
    ignored from the first call on. most_pixels: of the image, at most MOST_PIXELS, the default. before_decoding: gets
    the opened image, of which only the header is read. Raises UnreadableImage, with the file's name and the reason,
    whatever the decoder raises; also for a format that is not one of FORMATS.
    """
    limit = MOST_PIXELS if most_pixels is None else most_pixels
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    with _decoding(_name(file), limit), Image.open(source, formats=known_formats()) as opened:
        if before_decoding is not None:
            before_decoding(opened)
        return as_rgb(opened, limit, conversion)


def known_formats() -> list[str]:
    """Those of FORMATS that this Pillow can read, as `Image.open` accepts them."""
    Image.init()  # registers every format; returns at once if that was done before
    return [name for name in FORMATS if name in Image.OPEN]


def as_rgb(image: Image.Image, most_pixels: int | None = None, conversion: Conversion = CONVERSION) -> Image.Image:
    """A Pillow image of any mode as 8-bit RGB; see `open_image`.

    Raises what Pillow raises, or ValueError for an image without pixels, with too many, much longer than wide, or
    without its palette.
    """
    check_size(*image.size, MOST_PIXELS if most_pixels is None else most_pixels)
    if image.format == "TIFF" and image.mode in ("I", "F"):
        # The scale of 32-bit levels is unknown: those from 0 to 1, or from 0 to 255, would all become black.
        raise ValueError("32-bit TIFF, whose white level is not defined; save it with 8 or 16 bits")
    is_composited = conversion.alpha == "white"
    low_bytes = _prepare_transparency(image) if is_composited else None
    image.load()
    if not is_composited:
        image.info.pop("transparency", None)
    is_deep = image.mode == "I" or image.mode.startswith("I;16")
    is_stored = conversion.grey16 == "clip" if is_deep else not is_composited
    rgb = _as_stored(image) if is_stored else _on_white(image, low_bytes)
    transpose = transpose_of(image) if conversion.orient else None
    return rgb if transpose is None else rgb.transpose(transpose)


def check_size(width: int, height: int, most_pixels: int) -> None:
    """Raise ValueError for an image without pixels, with more than `most_pixels`, or above MOST_ELONGATION."""
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels: the image is empty")
    if width * height > most_pixels:
        raise ValueError(f"{width} x {height} pixels: the image {_too_large(most_pixels)}")
    if max(width, height) > MOST_ELONGATION * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels: one side is more than {MOST_ELONGATION:,} times the other; crop the image"
        )


def _too_large(most_pixels: int) -> str:
    return f"size exceeds the limit of {most_pixels:,} pixels; make it smaller"


def _on_white(image: Image.Image, low_bytes: np.ndarray | None) -> Image.Image:
    """A loaded image as RGB, composited on white. low_bytes: see `_prepare_transparency`."""
    key = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        # Pillow would clip 16-bit greys at 255, so that most of the image became white.
        rgb = Image.fromarray((np.clip(levels, 0, 65535).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
        return _erased(rgb, levels == key) if isinstance(key, int) else rgb
    if low_bytes is not None:
        high_bytes, colour = np.asarray(image), np.asarray(key)
        transparent = (high_bytes == colour >> 8) & (low_bytes == colour & 0xFF)
        return _erased(Image.fromarray(high_bytes), transparent.all(axis=2))
    if image.mode == "P" and image.palette is None:
        raise ValueError("a palette image without its palette")
    if image.mode == "La":  # Pillow converts it only to LA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")


def _as_stored(image: Image.Image) -> Image.Image:
    """A loaded image by Pillow's own conversion to RGB, which drops an alpha channel and clips 16-bit grey."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def _erased(rgb: Image.Image, transparent: np.ndarray) -> Image.Image:
    """An RGB image with white where it is transparent, bool (height, width)."""
    rgb.paste((255, 255, 255), mask=Image.fromarray(transparent.astype(np.uint8) * 255))
    return rgb


def _prepare_transparency(image: Image.Image) -> np.ndarray | None:
    """Scale a PNG's transparent colour to the pixels that Pillow decodes; call it before the image is loaded.

    The file has the colour in its own bit depth, but Pillow decodes greys of 2 and 4 bits to 8, and of 16-bit RGB the
    high bytes alone. Returns the low bytes of the latter, uint8 (height, width, 3), since a transparent pixel must
    match both.
    """
    key, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or not tiles or key is None:
        return None
    layout = tiles[0][3]  # Pillow's name of the file's pixel format
    if layout == "RGB;16B":
        return _low_bytes(image)
    if layout == "RGB":
        image.info["transparency"] = tuple(level % 256 for level in key)
    elif layout in ("L", "L;2", "L;4"):
        levels = 2 ** int(layout[2:] or 8)
        image.info["transparency"] = key % levels * (255 // (levels - 1))
    return None


def _low_bytes(image: Image.Image) -> np.ndarray:
    """The low bytes of a 16-bit RGB PNG that is opened but not loaded, uint8 (height, width, 3)."""
    file: IO[bytes] = image.fp  # type: ignore[attr-defined]
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    with Image.open(io.BytesIO(content)) as swapped:
        # Decoded as little-endian: Pillow keeps the second byte of each level instead of the first.
        swapped.tile = [(*tile[:3], "RGB;16L") for tile in swapped.tile]  # type: ignore[misc]
        return np.array(swapped)


def transpose_of(image: Image.Image) -> Image.Transpose | None:
    """The transpose for an image's EXIF orientation; None if it has none or its EXIF data are damaged."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of many types; the image itself is readable
        return None


@contextmanager
def _decoding(name: str, most_pixels: int = MOST_PIXELS) -> Iterator[None]:
    """Silence Pillow's warnings in the block, and turn whatever it raises into UnreadableImage with that name."""
    _silence_pillow()
    try:
        yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:  # before `check_size`; the text has only the number of pixels
        count = re.search(r"\d+", str(error))
        size = f"{int(count[0]):,} pixels: " if count else ""
        raise UnreadableImage(f"{name}: {size}the image {_too_large(most_pixels)}") from error
    except Exception as error:  # each decoder has its own types of errors
        raise UnreadableImage(f"{name}: {_reason(error)}") from error


def _silence_pillow() -> None:
    """Ignore Pillow's warnings from now on: they concern metadata and sizes, which do not change the pixels.

    `warnings.catch_warnings` would change the filters of all threads and repeat the warnings of other libraries, so a
    filter for Pillow's modules is added. It is looked up at each call, since code that restores older filters removes
    it.
    """
    first = warnings.filters[0] if warnings.filters else ("",) * 5
    if first[0] != "ignore" or getattr(first[3], "pattern", None) != PILLOW_MODULES:
        warnings.filterwarnings("ignore", module=PILLOW_MODULES)
        logging.getLogger("PIL").addHandler(NULL_HANDLER)  # without a handler, logging prints errors


def _name(image: ImageSource | Image.Image) -> str:
    """The name of an image in messages: its path if it has one."""
    if isinstance(image, str | os.PathLike):
        return str(image)
    if path := getattr(image, "filename", "") or getattr(image, "name", ""):
        return str(path)
    return "the image" if isinstance(image, bytes | Image.Image) or type(image) is io.BytesIO else str(image)


def _reason(error: Exception) -> str:
    """Why an image could not be decoded, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"is not a readable image; the supported formats are {', '.join(FORMATS)}"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if text and isinstance(error, OSError | ValueError | SyntaxError | EOFError):
        return text  # Pillow's own decoders raise these for damaged files
    return f"its decoder failed: {type(error).__name__}" + (f": {text}" if text else "")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An RGB image as the model's square input, before normalisation.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop. If the resized image would exceed
    MOST_RESIZED_PIXELS, only the crop is resized; Pillow may then resize rows before columns, and levels differ a
    little.
    """
    size, resampling = preprocessing.size, RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize_mode == "squash":
        return image.resize((size, size), resampling)
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    if width * height > MOST_RESIZED_PIXELS:
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), resampling, box=box)
    image = image.resize((width, height), resampling)
    return image.crop((left, top, left + size, top + size))


def normalise(image: Image.Image | np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """A square RGB image as float32 (3, size, size): scaled to 0..1, minus the mean, divided by the deviation.

    image: or its levels, uint8 (size, size, 3).
    """
    # Bytes are transposed before they become floats, four times as large, and these are changed in place.
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.asarray(preprocessing.mean, dtype=np.float32)[:, None, None]
    pixels /= np.asarray(preprocessing.std, dtype=np.float32)[:, None, None]
    return pixels


def prepare(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB image of any size as the model's input: float32 (3, size, size)."""
    return normalise(resize_and_crop(image, preprocessing), preprocessing)


def load_prepared(image: ImageSource | Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An image of any kind as the model's input: float32 (3, size, size). Raises UnreadableImage, naming the image.

    image: a path, an open binary file, its content as bytes, or a Pillow image.
    """
    with _decoding(_name(image)):
        rgb = as_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        return prepare(rgb, preprocessing)
