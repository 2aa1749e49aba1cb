"""Hostile images: every mode and format that Pillow writes, damaged, of false sizes, under false names."""

from __future__ import annotations

import io
import random
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.hostile import mutations
from comkd_cli.edge.images import FORMATS, Preprocessing, load_prepared, open_image

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F")
MODES_OF_16_BITS = ("I;16", "I;16B", "I;16L")
PREPROCESSING = Preprocessing(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
SIDES = (0, 1, 2, 7, 20_000, 65_500, 2**16, 2**31 - 1)
SUFFIXES = (".png", ".jpg", ".webp", ".tif", ".gif", ".bmp", ".avif")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(CANARY) (w) file closefile\nshowpage\n%%EOF\n"
SVG = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'


def image(rng: random.Random, folder: Path) -> None:
    """An image file, which is decoded and prepared as for training and for predict.py."""
    content = rng.choice(wholes()[rng.choice(("written", "made"))])
    if rng.random() < 0.75:
        content = mutations.damaged(rng, content)
    path = folder / f"hostile{rng.choice(SUFFIXES)}"
    path.write_bytes(content)
    picture = open_image(path)
    assert picture.mode == "RGB"
    del picture  # so that a large image is in memory once
    prepared = load_prepared(rng.choice((path, content, io.BytesIO(content))), PREPROCESSING)
    assert prepared.shape == (3, 16, 16)
    assert np.isfinite(prepared).all()


@cache
def wholes() -> dict[str, list[bytes]]:
    """Files that are made once, in seconds: those that Pillow writes, and those that it would not."""
    return {"written": _written(), "made": _made()}


def _written() -> list[bytes]:
    """Every mode in every format that takes it."""
    Image.init()
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    for mode in (*MODES, *MODES_OF_16_BITS):
        source = Image.fromarray(pixels)
        picture = Image.new(mode, source.size) if mode in MODES_OF_16_BITS else _converted(source, mode)
        for kind in sorted(Image.SAVE):
            more = ({"exif": _exif()}, {"save_all": True, "append_images": [picture]}) if kind in FORMATS else ()
            for options in ({}, *more):
                buffer = io.BytesIO()
                try:
                    picture.save(buffer, kind, **options)
                except Exception:  # of many types: a format that does not take this mode
                    continue
                found.append(buffer.getvalue())
    return found


def _converted(source: Image.Image, mode: str) -> Image.Image:
    through = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB", "PA": "P"}.get(mode)
    if mode == "LAB":
        return Image.new("LAB", source.size, (9, 8, 7))
    return (source.convert(through) if through else source).convert(mode)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "\x1b[31m<b>"
    return exif


def _made() -> list[bytes]:
    """Headers of any size above few bytes, and files that no image decoder should follow."""
    found = [EPS, SVG, b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"BM"]
    for width in SIDES:
        for height in SIDES:
            found.append(_png(width, height, bytes(64)))
            found.append(struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, *(0,) * 6))
            found.append(b"GIF89a" + struct.pack("<HHBBB", width % 2**16, height % 2**16, 0xF7, 0, 0) + bytes(800))
            found.append(_jpeg(width % 2**16, height % 2**16))
    for size in ((1, 20_000), (20_000, 1), (9_000, 9_000)):
        buffer = io.BytesIO()
        Image.new("L", size).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def _png(width: int, height: int, rows: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    text = _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + header + text + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header states another size than its data have."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)
