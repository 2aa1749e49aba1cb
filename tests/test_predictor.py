import hashlib
import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from comkd_cli import predictor
from comkd_cli.packaging.bundle import standalone_predictor
from comkd_cli.predictor import (
    BundleProblem,
    Classifier,
    Preprocessing,
    UnreadableImage,
    as_rgb,
    open_image,
    predict_all,
    prepare,
    read_manifest,
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
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(UnreadableImage, match=r"bomb\.png: .*exceeds limit"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of what is damaged
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
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


# --- classifying ---------------------------------------------------------------------------------------

COLOURS = {"red": (250, 10, 20), "green": (15, 240, 5), "blue": (0, 30, 255)}


def expected_logits(colour: tuple[int, int, int]) -> np.ndarray:
    """By hand what the bundle of tests/conftest.py answers to a picture of one colour."""
    weights = np.array([[5.0, -1.0, 0.5], [-1.0, 5.0, 0.25], [0.0, -2.0, 5.0]])
    channels = (np.array(colour) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    return weights @ channels + [0.125, -0.25, 0.5]


@pytest.mark.parametrize("name", COLOURS)
def test_the_likeliest_classes_come_first_with_their_softmax(colour_bundle: Path, tmp_path: Path, name: str) -> None:
    Image.new("RGB", (20, 12), COLOURS[name]).save(tmp_path / "one.png")
    predictions = Classifier(colour_bundle).predict(tmp_path / "one.png")
    exponentials = np.exp(expected_logits(COLOURS[name]))
    expected = dict(zip(("red", "green", "blue"), exponentials / exponentials.sum(), strict=True))
    assert predictions[0].class_name == name
    assert [p.class_name for p in predictions] == sorted(expected, key=lambda key: -expected[key])
    assert {p.class_name: p.probability for p in predictions} == pytest.approx(expected, abs=1e-5)


def test_a_picture_in_memory_is_classified_as_its_file_is(colour_bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier(colour_bundle, threads=1)
    half_clear = Image.new("RGBA", (9, 30), (200, 10, 10, 128))
    half_clear.save(tmp_path / "one.png")
    assert classifier.predict(half_clear) == classifier.predict(str(tmp_path / "one.png"))


def test_no_more_classes_are_named_than_asked_for_or_there(colour_bundle: Path) -> None:
    classifier = Classifier(colour_bundle)
    picture = Image.new("RGB", (8, 8), "red")
    assert [len(classifier.predict(picture, top)) for top in (1, 2, 5)] == [1, 2, 3]
    assert len(classifier.predict(picture)) == 3


def test_logits_of_a_batch_are_those_of_each_image(colour_bundle: Path) -> None:
    classifier = Classifier(colour_bundle)
    batch = np.stack(
        [prepare(Image.new("RGB", (8, 8), colour), classifier.preprocessing) for colour in COLOURS.values()]
    )
    logits = classifier.logits(batch)
    assert logits.shape == (3, 3)
    assert np.allclose(logits, [expected_logits(colour) for colour in COLOURS.values()], atol=1e-4)


def test_an_unreadable_image_does_not_keep_the_others_from_their_answer(colour_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), COLOURS["blue"]).save(tmp_path / "blue.png")
    (tmp_path / "odd.png").write_text("no picture")
    images = [str(tmp_path / name) for name in ("odd.png", "blue.png")]
    odd, blue = predict_all(Classifier(colour_bundle), images, top=1)
    assert odd["image"] == images[0]
    assert odd["error"].startswith(f"{images[0]}: ")
    assert (blue["image"], [entry["class"] for entry in blue["classes"]]) == (images[1], ["blue"])


# --- bundles that cannot be used -----------------------------------------------------------------------


def change_manifest(bundle: Path, **fields: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def problem(bundle: Path) -> str:
    with pytest.raises(BundleProblem) as caught:
        Classifier(bundle)
    return str(caught.value)


def test_a_folder_without_a_manifest_is_no_bundle(colour_bundle: Path, tmp_path: Path) -> None:
    assert problem(tmp_path) == f"{tmp_path} is not a bundle: it has no manifest.json"
    assert problem(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is not a bundle: it has no manifest.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "can't be read"),
        (b"", "can't be read"),
        (b'{"format": "\xff"}', "can't be read"),
        (b"[]", "is not a manifest of format comkd-bundle/1"),
        (b"{}", "is not a manifest of format comkd-bundle/1"),
        (b'{"format": "comkd-bundle/2", "preprocessing": {}, "files": {}}', "comkd-bundle/2 of a newer comkd"),
        (b'{"format": "comkd-bundle/x", "preprocessing": {}, "files": {}}', "of format comkd-bundle/1"),
        (b'{"format": "other/2", "preprocessing": {}, "files": {}}', "of format comkd-bundle/1"),
        (b'{"format": "comkd-bundle/' + b"9" * 5000 + b'"}', "of format comkd-bundle/1"),
        (b'{"format": ["comkd-bundle/2"]}', "of format comkd-bundle/1"),
        (b'{"format": "comkd-bundle/1"}', "lacks files, precisions, preprocessing"),
        (b'{"format": "comkd-bundle/1", "preprocessing": {}}', "lacks files, precisions"),
        (b'{"format": "comkd-bundle/1", "preprocessing": {}, "files": {}, "precisions": {}}', "at least one precision"),
    ],
)
def test_a_manifest_that_is_none_is_named_with_the_reason(colour_bundle: Path, content: bytes, message: str) -> None:
    (colour_bundle / "manifest.json").write_bytes(content)
    for read in (Classifier, read_manifest):
        with pytest.raises(BundleProblem) as caught:
            read(colour_bundle)
        assert str(caught.value).startswith(f"{colour_bundle / 'manifest.json'}: ")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preprocessing": {"size": 8}}, "preprocessing: "),
        ({"preprocessing": {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "crop": 3}}, "crop"),
        ({"preprocessing": [8]}, "preprocessing: "),
        (
            {"preprocessing": {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "lanczos"}},
            "interpolation lanczos",
        ),
        ({"files": {}}, "does not list classes.txt"),
        ({"files": []}, "does not list classes.txt"),
        ({"files": {"classes.txt": {}}}, "does not list classes.txt"),
        ({"files": {"classes.txt": {"bytes": 3}}}, "does not list classes.txt"),
    ],
)
def test_a_manifest_that_lacks_something_is_named_with_what_it_lacks(
    colour_bundle: Path, fields: dict[str, Any], message: str
) -> None:
    change_manifest(colour_bundle, **fields)
    said = problem(colour_bundle)
    assert said.startswith(f"{colour_bundle / 'manifest.json'}: ")
    assert message in said


@pytest.mark.parametrize("name", ["classes.txt", "classifier.onnx"])
@pytest.mark.parametrize("position", [0, -1, 5])
def test_one_flipped_bit_is_found_and_its_file_named(colour_bundle: Path, name: str, position: int) -> None:
    content = bytearray((colour_bundle / name).read_bytes())
    content[position] ^= 1
    (colour_bundle / name).write_bytes(content)
    assert problem(colour_bundle).startswith(f"{colour_bundle / name}: is not the file that was exported")


@pytest.mark.parametrize("name", ["classes.txt", "classifier.onnx"])
def test_a_missing_file_is_named(colour_bundle: Path, name: str) -> None:
    (colour_bundle / name).unlink()
    assert problem(colour_bundle).startswith(f"{colour_bundle / name}: can't be read: ")


def test_a_graph_that_onnxruntime_refuses_is_named(colour_bundle: Path) -> None:
    content = b"no graph"
    (colour_bundle / "classifier.onnx").write_bytes(content)
    files = json.loads((colour_bundle / "manifest.json").read_text())["files"]
    files["classifier.onnx"] = {"sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(colour_bundle, files=files)
    assert problem(colour_bundle).startswith(f"{colour_bundle / 'classifier.onnx'}: onnxruntime can't load it")


# --- the file on its own -------------------------------------------------------------------------------

ALONE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("predict", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["predict"] = module
spec.loader.exec_module(module)
(answer,) = module.Classifier(sys.argv[2]).predict(sys.argv[3], top=1)
loaded = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([answer.class_name, sorted(loaded & {"torch", "torchvision", "comkd_cli", "open_clip", "onnx"})]))
"""


@pytest.fixture
def delivered(colour_bundle: Path, tmp_path: Path) -> Path:
    """The bundle as export leaves it, with predict.py in it, and beside it a red picture and no picture."""
    (colour_bundle / "predict.py").write_text(standalone_predictor(), encoding="utf-8")
    Image.new("RGB", (8, 8), COLOURS["red"]).save(tmp_path / "red.png")
    (tmp_path / "odd.png").write_text("no picture")
    return colour_bundle


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def test_the_file_works_in_a_fresh_interpreter_and_loads_neither_torch_nor_the_package(
    delivered: Path, tmp_path: Path
) -> None:
    done = python(tmp_path, "-c", ALONE, str(delivered / "predict.py"), str(delivered), "red.png")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["red", []]


def test_the_file_is_a_command_that_finds_its_bundle_around_it(delivered: Path, tmp_path: Path) -> None:
    done = python(tmp_path, str(delivered / "predict.py"), "odd.png", "red.png", "--top", "1", "--json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: odd.png: ")
    odd, red = json.loads(done.stdout)["predictions"]
    assert "classes" not in odd
    assert [entry["class"] for entry in red["classes"]] == ["red"]


def test_the_command_prints_lines_and_says_what_is_wrong_by_its_status(
    delivered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, bundle = str(tmp_path / "red.png"), str(delivered)
    assert predictor.main([red, "--bundle", bundle, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == red
    assert [line.split()[1] for line in lines[1:]] == ["red", "blue"]
    assert lines[1].split()[0].endswith("%")
    assert predictor.main([red, "--bundle", str(tmp_path)]) == 1
    assert "is not a bundle" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        predictor.main([red, "--bundle", bundle, "--top", "0"])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("size", "16", "size should be a number of pixels"),
        ("size", 0, "size should be a number of pixels"),
        ("mean", [0.5, 0.5], "mean should be three numbers"),
        ("std", [0.5, 0.5, "x"], "std should be three numbers"),
        ("interpolation", ["bicubic"], "is not known"),
        ("resize_mode", "wide", "is not known"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_told(
    colour_bundle: Path, place: str, value: object, message: str
) -> None:
    path = colour_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["preprocessing"][place] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleProblem, match=rf"manifest\.json: preprocessing: .*{message}"):
        Classifier(colour_bundle)


def test_a_size_that_is_not_the_graphs_is_told(colour_bundle: Path, tmp_path: Path) -> None:
    path = colour_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["preprocessing"]["size"] = 12
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleProblem, match=r"does not take what manifest\.json says"):
        Classifier(colour_bundle).predict(Image.new("RGB", (20, 20)))
