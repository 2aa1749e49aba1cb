import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from comkd_cli.edge import images as edge_images
from comkd_cli.edge.images import (
    Preprocessing,
    UnreadableImage,
    as_rgb,
    load_prepared,
    open_image,
    prepare,
    resize_and_crop,
)

Noise = Callable[..., Image.Image]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels(image: Image.Image) -> list[Any]:
    """Row by row, as (red, green, blue)."""
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


# --- pre-processing ------------------------------------------------------------------------------------

SIZES = [(32, 32), (33, 57), (57, 33), (31, 200), (200, 31), (7, 5), (1, 9), (640, 427), (427, 641)]


def reference(settings: Preprocessing) -> transforms.Compose:
    """What the settings mean, in torchvision's words."""
    mode = transforms.InterpolationMode(settings.interpolation)
    if settings.resize_mode == "squash":
        shaped = [transforms.Resize((settings.size, settings.size), mode)]
    else:
        shaped = [transforms.Resize(settings.size, mode), transforms.CenterCrop(settings.size)]
    return transforms.Compose([*shaped, transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [32, 33])
def test_preprocessing_is_torchvisions_bit_by_bit(
    noise: Noise, size: tuple[int, int], resize_mode: str, interpolation: str, side: int
) -> None:
    settings = Preprocessing(side, MEAN, STD, interpolation, resize_mode)
    prepared = prepare(noise(*size), settings)
    assert (prepared.shape, prepared.dtype) == ((3, side, side), np.float32)
    assert prepared.flags.c_contiguous
    assert np.array_equal(prepared, reference(settings)(noise(*size)).numpy())


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_any_size_is_resized_and_cropped_as_torchvision_does(width: int, height: int, side: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    settings = Preprocessing(side, MEAN, STD)
    shaped = transforms.CenterCrop(side)(transforms.Resize(side, transforms.InterpolationMode.BICUBIC)(picture))
    assert np.array_equal(np.asarray(resize_and_crop(picture, settings)), np.asarray(shaped))


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_preprocessing_is_open_clips_bit_by_bit(noise: Noise, resize_mode: str) -> None:
    from open_clip import image_transform

    theirs = image_transform(48, is_train=False, mean=MEAN, std=STD, resize_mode=resize_mode)
    for size in SIZES:
        prepared = prepare(noise(*size), Preprocessing(48, MEAN, STD, resize_mode=resize_mode))
        assert np.array_equal(prepared, theirs(noise(*size)).numpy())


# --- reading pictures: turned --------------------------------------------------------------------------

# For each EXIF orientation, the sides of the picture that the first row and the first column show.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright: np.ndarray, first_row: str, first_column: str) -> np.ndarray:
    """The pixels that a camera writes for a picture, by the EXIF standard's words for its orientation."""
    height, width, _ = upright.shape
    backwards = {"top": False, "left": False, "bottom": True, "right": True}
    rows = range(height - 1, -1, -1) if backwards[first_row] else range(height)
    if first_row in ("top", "bottom"):
        columns = range(width - 1, -1, -1) if backwards[first_column] else range(width)
        return np.array([[upright[y, x] for x in columns] for y in rows])
    columns = range(width - 1, -1, -1) if backwards[first_row] else range(width)
    rows = range(height - 1, -1, -1) if backwards[first_column] else range(height)
    return np.array([[upright[y, x] for y in rows] for x in columns])


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_picture_is_turned_upright_as_its_exif_data_say(
    tmp_path: Path, noise: Noise, orientation: int, suffix: str
) -> None:
    upright = np.asarray(noise(5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    camera = Image.fromarray(stored(upright, *ORIENTATIONS[orientation]))
    camera.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(np.asarray(open_image(path)), upright)


def jpeg_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value) entries, whatever they hold."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


@pytest.mark.parametrize(
    "damaged",
    [
        (0x0128, 2, 2, b"2\0\0\0"),  # ResolutionUnit, a number, as text
        (0x011A, 2, 2, b"7\0\0\0"),  # XResolution, a fraction, as text
        (0x010E, 11, 1, b"\0\0\0\0"),  # ImageDescription, a text, as a number
    ],
)
def test_a_picture_is_turned_upright_also_where_other_exif_data_are_damaged(
    tmp_path: Path, damaged: tuple[int, int, int, bytes]
) -> None:
    camera = Image.new("RGB", (32, 16), "red")
    camera.paste("blue", (16, 0, 32, 16))
    entries = sorted([(0x0112, 3, 1, struct.pack("<HH", 6, 0)), damaged])
    camera.save(tmp_path / "turned.jpg", exif=jpeg_exif(*entries))
    picture = open_image(tmp_path / "turned.jpg")
    assert picture.size == (16, 32)  # 6: the camera's left is the picture's top
    assert picture.getpixel((8, 4)) == pytest.approx((255, 0, 0), abs=3)
    assert picture.getpixel((8, 28)) == pytest.approx((0, 0, 255), abs=3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path: Path, noise: Noise, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(5, 3).save(tmp_path / "odd.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "odd.png")), np.asarray(noise(5, 3)))


# --- reading pictures: colours -------------------------------------------------------------------------


def reopened(image: Image.Image, path: Path, **options: Any) -> list[Any]:
    image.save(path, **options)
    return pixels(open_image(path))


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 255, 0, 128])
    image.putdata([2, 0, 1])
    for name in ("p.png", "p.bmp", "p.gif"):
        assert reopened(image, tmp_path / name) == [[(255, 0, 128), (10, 20, 30), (40, 50, 60)]]


def test_what_is_transparent_in_a_palette_shows_white(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 40, 50, 60, 100, 0, 200])
    image.putdata([0, 1, 2])
    assert reopened(image, tmp_path / "one.png", transparency=0) == [[(255, 255, 255), (40, 50, 60), (100, 0, 200)]]
    half = reopened(image, tmp_path / "each.png", transparency=bytes([0, 255, 51]))[0]
    assert half[:2] == [(255, 255, 255), (40, 50, 60)]
    assert half[2] == pytest.approx((224, 204, 244), abs=1)  # a fifth of the colour, four fifths of white


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (100, 0, 200, 51)])
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True, "exact": True})):
        shown = reopened(image, tmp_path / name, **options)[0]
        assert shown[:2] == [(10, 20, 30), (255, 255, 255)]
        assert shown[2] == pytest.approx((224, 204, 244), abs=1)


def test_grey_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (3, 1))
    image.putdata([(40, 255), (40, 0), (0, 51)])
    shown = reopened(image, tmp_path / "la.png")[0]
    assert shown[:2] == [(40, 40, 40), (255, 255, 255)]
    assert shown[2] == pytest.approx((204, 204, 204), abs=1)


def test_grey_and_black_and_white_become_equal_channels(tmp_path: Path) -> None:
    grey = Image.new("L", (3, 1))
    grey.putdata([0, 77, 255])
    for name in ("g.png", "g.bmp"):
        assert reopened(grey, tmp_path / name) == [[(0, 0, 0), (77, 77, 77), (255, 255, 255)]]
    scan = Image.new("1", (2, 1))
    scan.putdata([0, 255])
    assert reopened(scan, tmp_path / "scan.png") == [[(0, 0, 0), (255, 255, 255)]]


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 255, 256, 0x4D00, 0x8000, 0xFFFF]], dtype=np.uint16)
    expected = [[(v, v, v) for v in (0, 0, 1, 0x4D, 0x80, 0xFF)]]
    assert reopened(Image.fromarray(levels), tmp_path / "deep.png") == expected
    assert pixels(as_rgb(Image.fromarray(levels.astype(np.int32)))) == expected  # as older Pillows open it


def test_colour_bmp_and_lossless_webp_come_out_as_they_went_in(tmp_path: Path, noise: Noise) -> None:
    for name, options in (("x.bmp", {}), ("x.webp", {"lossless": True}), ("x.png", {})):
        noise(13, 7).save(tmp_path / name, **options)
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), np.asarray(noise(13, 7)))


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_a_cmyk_jpeg_shows_the_colour_of_its_inks(
    tmp_path: Path, ink: tuple[int, ...], colour: tuple[int, ...]
) -> None:
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "print.jpg", quality=100)
    assert open_image(tmp_path / "print.jpg").getpixel((8, 8)) == pytest.approx(colour, abs=2)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert open_image(tmp_path / f"moving.{suffix}").getpixel((1, 1)) == (255, 0, 0)


# --- reading pictures: transparent colours of PNG ------------------------------------------------------

GREY, COLOUR, PALETTE = 0, 2, 3  # PNG's colour types
BIT_DEPTHS = [(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (COLOUR, 8), (COLOUR, 16)]
# Adam7, by the PNG standard: first column, first row, and the steps between columns and rows of each pass.
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed(samples: np.ndarray, depth: int) -> bytes:
    """Rows of samples (height, width, channels) as PNG stores them: without a filter, most significant bit first."""
    rows = b""
    for row in samples.reshape(len(samples), -1).tolist():
        bits = "".join(format(sample, f"0{depth}b") for sample in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    return rows


def png(
    samples: np.ndarray,
    depth: int,
    colour_type: int,
    transparent: bytes | None = None,
    palette: bytes | None = None,
    interlaced: bool = False,
) -> bytes:
    """A PNG file of integer samples (height, width, channels), written by the standard and without Pillow."""
    height, width, _ = samples.shape
    parts = [samples[y::dy, x::dx] for x, y, dx, dy in PASSES] if interlaced else [samples]
    content = b"".join(packed(part, depth) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header),
            chunk(b"PLTE", palette) if palette else b"",
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b""),
        ]
    )


def some_samples(colour_type: int, depth: int) -> np.ndarray:
    """Samples (9, 11, channels) whose first pixel comes again, and beside it pixels that differ from it by one bit."""
    channels = 3 if colour_type == COLOUR else 1
    samples = np.random.default_rng(depth).integers(0, 2**depth, (9, 11, channels))
    samples[3, 5:8] = samples[0, 0]
    samples[4, 5] = samples[0, 0] ^ 1
    samples[4, 6] = samples[0, 0] ^ (1 << (depth - 1))
    samples[4, 7, :-1] = samples[0, 0, :-1]
    return samples


def shown_on_white(samples: np.ndarray, depth: int, key: np.ndarray | None) -> np.ndarray:
    """By the PNG standard: samples scaled to 8 bits, and white where all of a pixel's are the key's."""
    scaled = samples >> 8 if depth == 16 else samples * 255 // (2**depth - 1)
    rgb = np.broadcast_to(scaled, (*samples.shape[:2], 3)).copy()
    if key is not None:
        rgb[(samples == key).all(axis=2)] = 255
    return rgb


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(("colour_type", "depth"), BIT_DEPTHS)
def test_a_transparent_colour_of_any_bit_depth_shows_white_and_no_other_does(
    tmp_path: Path, colour_type: int, depth: int, keyed: bool, interlaced: bool
) -> None:
    samples = some_samples(colour_type, depth)
    key = samples[0, 0] if keyed else None
    content = png(
        samples,
        depth,
        colour_type,
        transparent=None if key is None else struct.pack(f">{len(key)}H", *key),
        interlaced=interlaced,
    )
    expected = shown_on_white(samples, depth, key)
    (tmp_path / "keyed.png").write_bytes(content)
    for file in (tmp_path / "keyed.png", content, BytesIO(content)):
        assert np.array_equal(np.asarray(open_image(file)), expected)
    with Image.open(tmp_path / "keyed.png") as opened:
        assert np.array_equal(np.asarray(as_rgb(opened)), expected)


def test_bits_of_a_transparent_colour_beyond_its_depth_do_not_count() -> None:
    samples = some_samples(COLOUR, 8)
    content = png(samples, 8, COLOUR, struct.pack(">3H", *(samples[0, 0] + 0x300)))
    assert np.array_equal(np.asarray(open_image(content)), shown_on_white(samples, 8, samples[0, 0]))
    grey = some_samples(GREY, 4)
    content = png(grey, 4, GREY, struct.pack(">H", grey[0, 0, 0] + 16))
    assert np.array_equal(np.asarray(open_image(content)), shown_on_white(grey, 4, grey[0, 0]))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_with_transparency_is_laid_on_white(depth: int) -> None:
    indices = some_samples(PALETTE, depth) % 4
    colours = np.random.default_rng(1).integers(0, 256, (2**depth, 3), dtype=np.uint8)
    alpha = np.array([0, 255, 0, 255][: 2**depth], dtype=np.uint8)
    content = png(indices, depth, PALETTE, alpha.tobytes(), colours.tobytes())
    expected = np.where(alpha[indices] == 0, 255, colours[indices[..., 0]])
    assert np.array_equal(np.asarray(open_image(content)), expected)


def test_16_bit_alpha_is_laid_on_white() -> None:
    samples = np.array([[[0x1234, 0x8000, 0xFF00, 0xFFFF], [0x1234, 0x8000, 0xFF00, 0]]])
    assert pixels(open_image(png(samples, 16, 6))) == [[(0x12, 0x80, 0xFF), (255, 255, 255)]]
    grey = np.array([[[0x4D12, 0xFFFF], [0x4D12, 0]]])
    assert pixels(open_image(png(grey, 16, 4))) == [[(0x4D, 0x4D, 0x4D), (255, 255, 255)]]


# --- reading pictures: images in memory ----------------------------------------------------------------


def half_clear(mode: str) -> Image.Image:
    """A pixel of (200, 100, 50) and the same with no opacity, in a mode with alpha."""
    image = Image.new("RGBA", (2, 1))
    image.putdata([(200, 100, 50, 255), (200, 100, 50, 0)])
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode == "PA":
        palette = Image.new("PA", (2, 1))
        palette.putpalette([0, 0, 0, 200, 100, 50])
        palette.putdata([(1, 255), (1, 0)])
        return palette
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_of_every_mode_is_laid_on_white(mode: str) -> None:
    grey = half_clear("LA").getpixel((0, 0))[0]  # type: ignore[index]
    colour = (grey, grey, grey) if mode in ("LA", "La") else (200, 100, 50)
    assert pixels(as_rgb(half_clear(mode))) == [[colour, (255, 255, 255)]]


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_16_bit_grey_of_either_byte_order_is_scaled(tmp_path: Path, byte_order: str) -> None:
    levels = np.array([[0, 255, 256, 0x4D00, 0x8000, 0xFFFF]], dtype=f"{byte_order}u2")
    Image.fromarray(levels).save(tmp_path / "deep.tif")
    expected = [[(v, v, v) for v in (0, 0, 1, 0x4D, 0x80, 0xFF)]]
    assert pixels(open_image(tmp_path / "deep.tif")) == pixels(as_rgb(Image.fromarray(levels))) == expected


def test_grey_beyond_16_bits_is_clipped_and_does_not_wrap_around() -> None:
    levels = np.array([[-1, 0x4D00, 0x10000, 2**31 - 1]], dtype=np.int32)
    assert pixels(as_rgb(Image.fromarray(levels))) == [[(v, v, v) for v in (0, 0x4D, 255, 255)]]


def test_floating_point_grey_is_taken_as_levels_of_8_bits() -> None:
    levels = np.array([[-5.0, 77.0, 300.0]], dtype=np.float32)
    assert pixels(as_rgb(Image.fromarray(levels))) == [[(v, v, v) for v in (0, 77, 255)]]


@pytest.mark.parametrize("levels", [np.linspace(0, 1, 64, dtype=np.float32), np.arange(64, dtype=np.int32)])
def test_a_tiff_of_32_bits_is_unreadable_and_not_black(tmp_path: Path, levels: np.ndarray) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(levels.reshape(8, 8)).save(path)
    with pytest.raises(UnreadableImage, match=r"deep\.tif: 32-bit TIFF"):
        open_image(path)
    path = tmp_path / "sixteen.tif"
    Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)).save(path)
    assert np.asarray(open_image(path)).max() == 63_000 >> 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "I", "I;16", "F", "HSV"])
def test_a_picture_of_any_mode_is_turned_by_its_exif_data(noise: Noise, mode: str) -> None:
    image = Image.new("PA", (5, 3)) if mode == "PA" else noise(5, 3).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    plain = np.asarray(as_rgb(image.copy()))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    assert np.array_equal(np.asarray(as_rgb(image)), np.rot90(plain, -1))


# --- reading pictures: damaged -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_a_truncated_picture_is_unreadable_by_name(tmp_path: Path, noise: Noise, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise(64, 64).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnreadableImage) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value) != f"{path}: "


@pytest.mark.parametrize(
    "content", [b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", bytes(1000), b"RIFF\0\0\0\0WEBPVP8 "]
)
def test_a_file_that_is_no_picture_is_unreadable_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"odd\.png: "):
        open_image(path)


def test_a_missing_file_and_a_folder_are_unreadable_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(UnreadableImage) as caught:
            open_image(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_picture_that_would_fill_the_memory_is_unreadable_by_name(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(UnreadableImage, match=r"bomb\.png: 3,600,000,000 pixels: .* make it smaller$"):
        open_image(path)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a program around it may do without Pillow's limit
    header = struct.pack(">IIBBBBB", 20000, 9000, 8, 2, 0, 0, 0)
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(UnreadableImage, match=r"large\.png: 20000 x 9000 pixels: .* exceeds the limit of 178,956,970"):
        open_image(path)
    monkeypatch.setattr(edge_images, "MOST_PIXELS", 11)
    with pytest.raises(ValueError, match="4 x 3 pixels"):
        as_rgb(Image.new("RGB", (4, 3)))
    assert as_rgb(Image.new("RGB", (11, 1))).size == (11, 1)


@pytest.mark.parametrize(("size", "allowed"), [((1, 20_000), False), ((1001, 1), False), ((1000, 1), True)])
def test_an_image_much_longer_than_wide_is_refused_with_a_remedy(
    tmp_path: Path, size: tuple[int, int], allowed: bool
) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", size).save(path)
    if allowed:
        assert open_image(path).size == size
        return
    with pytest.raises(UnreadableImage, match=r"line\.png: \d+ x \d+ pixels: one side .* 1,000 times .*; crop"):
        open_image(path)


def test_a_lower_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.new("RGB", (4, 3)).save(path)
    assert open_image(path, most_pixels=12).size == (4, 3)
    with pytest.raises(UnreadableImage, match=r"4 x 3 pixels: .* limit of 11 pixels; make it smaller"):
        open_image(path, most_pixels=11)


@pytest.mark.parametrize("kind", ["EPS", "DDS", "PCX", "TGA", "ICO"])
def test_a_format_that_no_image_file_of_comkd_has_is_not_decoded(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPS is decoded by Ghostscript, which runs the program in the file."""

    def start(*command: object, **_options: object) -> None:
        raise AssertionError(f"a program was started: {command}")

    monkeypatch.setattr(subprocess, "Popen", start)
    Image.new("RGB", (16, 16)).save(tmp_path / "image", kind)
    (tmp_path / "image").rename(tmp_path / "image.png")
    with pytest.raises(UnreadableImage, match=r"image\.png: is not a readable image; the supported formats are JPEG, "):
        open_image(tmp_path / "image.png")


def test_an_image_without_pixels_is_unreadable() -> None:
    with pytest.raises(UnreadableImage, match=r"^the image: 0 x 5 pixels"):
        load_prepared(Image.new("RGB", (0, 5)), Preprocessing(8, MEAN, STD))


def test_a_palette_png_without_its_palette_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "bare.png"
    path.write_bytes(png(some_samples(PALETTE, 8), 8, PALETTE))
    with pytest.raises(UnreadableImage, match=r"bare\.png: a palette image without its palette"):
        open_image(path)


ERRORS = [
    RuntimeError("Failed to decode image"),
    NotImplementedError("Unimplemented pixel format"),
    AttributeError("'NoneType' object has no attribute 'x'"),
    AssertionError(),
    KeyError("compression"),
    struct.error("unpack requires a buffer of 4 bytes"),
    zlib.error("Error -3"),
    ZeroDivisionError("division by zero"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    OverflowError("too large"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["open", "load"])
def test_whatever_a_decoder_raises_is_an_unreadable_image_with_name_and_reason(
    tmp_path: Path, noise: Noise, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    noise(4, 4).save(tmp_path / "x.png")

    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(*((Image, "open") if step == "open" else ("PIL.PngImagePlugin.PngImageFile.load",)), fail)
    with pytest.raises(UnreadableImage) as caught:
        open_image(tmp_path / "x.png")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'x.png'}: ")
    assert "memory" in said if isinstance(error, MemoryError) else type(error).__name__ in said
    assert "\n" not in said


def warnings_of(file: Path | bytes) -> list[str]:
    """What Pillow warns of where nobody filters it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as opened:
            opened.load()
            opened.convert("RGB")
    return [str(warning.message) for warning in caught]


def noisy_pictures() -> dict[str, bytes]:
    """Files that Pillow warns of, by what it warns of."""
    clear = Image.new("P", (3, 1))
    clear.putpalette([0, 0, 0, 40, 50, 60, 100, 0, 200])
    made = {name: BytesIO() for name in ("transparency", "large")}
    clear.save(made["transparency"], "PNG", transparency=bytes([0, 128, 255]))
    Image.new("L", (15, 10)).save(made["large"], "PNG")
    found = {name: buffer.getvalue() for name, buffer in made.items()}
    bare = found["transparency"]
    at = bare.index(b"PLTE") - 4
    # An APNG control chunk that promises no frame: Pillow warns while it opens the file.
    return {**found, "animation": bare[:at] + chunk(b"acTL", bytes(8)) + bare[at:]}


@pytest.mark.parametrize("name", ["transparency", "large", "animation"])
@pytest.mark.parametrize("action", ["error", "always"])
def test_no_warning_of_pillow_reaches_a_user_or_makes_a_picture_unreadable(
    name: str, action: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # up to twice as many it warns
    content = noisy_pictures()[name]
    assert warnings_of(content)  # else this proves nothing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        for _ in range(2):  # also where filters were changed since
            open_image(content)
            warnings.simplefilter(action)
        open_image(content)
    assert caught == []


def test_warnings_of_others_are_shown_as_often_as_before() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # once for each place
        for _ in range(3):
            open_image(png(some_samples(GREY, 8), 8, GREY))
            warnings.warn("of mine", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["of mine"]


def test_threads_that_read_at_once_add_one_filter_and_hear_no_warning() -> None:
    content = noisy_pictures()["animation"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(open_image, [content] * 200))
        own = [entry for entry in warnings.filters if "PIL" in getattr(entry[3], "pattern", "")]
        assert len(own) == 1
    assert caught == []


# --- reading pictures: extreme shapes ------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (901, 3), (7, 5000)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_crop_of_a_long_shape_is_resized_alone_to_the_same_picture(
    noise: Noise, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], interpolation: str
) -> None:
    settings = Preprocessing(32, MEAN, STD, interpolation)
    whole = np.asarray(resize_and_crop(noise(*size), settings)).astype(int)
    monkeypatch.setattr(edge_images, "MOST_RESIZED_PIXELS", 0)
    crop = np.asarray(resize_and_crop(noise(*size), settings)).astype(int)
    assert np.abs(whole - crop).max() <= 16  # noise is the worst case
    shifted = np.roll(crop, 1, axis=1 if size[0] > size[1] else 0)
    assert np.abs(whole - crop).mean() < np.abs(whole - shifted).mean() / 4


LINE = """
import resource, sys
from comkd_cli.edge.images import Preprocessing, open_image, prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    prepare(open_image(path), Preprocessing(448, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_line_of_a_picture_takes_little_memory(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("wide.png", "high.png")]
    Image.new("RGB", (65000, 65), "red").save(paths[0])
    Image.new("RGB", (65, 65000), "red").save(paths[1])
    done = subprocess.run(
        [sys.executable, "-c", LINE, *map(str, paths)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < 150_000  # KiB; the whole resized strip would be 800 MB, the decoded one is 17 MB
    shown = prepare(open_image(paths[0]), Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert np.array_equal(shown, np.broadcast_to(np.array([1, 0, 0], np.float32)[:, None, None], (3, 8, 8)))


# --- reading pictures: damage at random ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_damage_of_any_kind_leaves_a_picture_or_an_unreadable_file(tmp_path: Path, noise: Noise, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    buffer = BytesIO()
    noise(23, 31).save(
        buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **({} if suffix == "bmp" else {"exif": exif})
    )
    whole, dice = buffer.getvalue(), random.Random(1)
    path, reasons = tmp_path / f"damaged.{suffix}", []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 8])):
            damaged[dice.randrange(min(len(whole), dice.choice([100, 300, len(whole)])))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except UnreadableImage as error:
            reasons.append(str(error))
    assert 0 < len(reasons) < 400
    assert all(reason.startswith(f"{path}: ") for reason in reasons)
