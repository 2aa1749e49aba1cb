"""The reference images show what they are for: each mistake of a reader is beyond the limit on one of them."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from comkd_cli.bundles.reference import JPEG_LEVELS, LOSSLESS_LEVELS
from comkd_cli.bundles.reference_images import reference_images
from comkd_cli.edge.images import Preprocessing, open_image, resize_and_crop

SIZES = (16, 224)
MODES = {
    "odd": "RGB",
    "portrait": "RGB",
    "rotated": "RGB",
    "grey": "L",
    "palette": "P",
    "cmyk": "CMYK",
    "deep": "I;16",
    "photo": "RGB",
}


@contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    with Image.open(io.BytesIO(content)) as image:
        yield image


def test_the_images_are_of_the_kinds_that_they_show() -> None:
    images = {image.name: image for image in reference_images()}
    assert list(images) == list(MODES)
    sizes = {}
    for name, image in images.items():
        with opened(image.content) as file:
            assert file.mode == MODES[name]
            assert image.lossless == (file.format in ("PNG", "TIFF"))
            sizes[name] = file.size
    assert sizes["portrait"][1] > sizes["portrait"][0]
    assert all(side % 2 for side in sizes["odd"])
    with opened(images["rotated"].content) as file:
        assert file.getexif()[0x0112] == 6
        assert open_image(images["rotated"].content).size == file.size[::-1]
    with opened(images["palette"].content) as file:
        assert len(set(file.info["transparency"])) > 1
    with opened(images["deep"].content) as file:
        assert len(np.unique(np.asarray(file) & 0xFF)) > 1
    assert sum(len(image.content) for image in images.values()) < 600_000


def test_the_images_are_the_same_each_time() -> None:
    first = reference_images()
    reference_images.cache_clear()
    assert [image.content for image in reference_images()] == [image.content for image in first]


@cache
def prepared(size: int) -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Each image in RGB, and as comkd resizes it, int (size, size, 3), by its name."""
    preprocessing = Preprocessing(size, (0, 0, 0), (1, 1, 1))
    colours = {image.name: open_image(image.content) for image in reference_images()}
    return {name: (rgb, np.asarray(resize_and_crop(rgb, preprocessing)).astype(int)) for name, rgb in colours.items()}


def levels(resize: Callable[[Image.Image, int], np.ndarray], size: int, names: Sequence[str]) -> dict[str, int]:
    """The largest difference of a resizer from comkd's, in levels, by the name of the image."""
    return {
        name: int(np.abs(resize(rgb, size) - expected).max())
        for name, (rgb, expected) in prepared(size).items()
        if name in names
    }


def by_torchvision(image: Image.Image, size: int, antialias: bool = True, filter_: str = "BICUBIC") -> np.ndarray:
    """Resized on floats, without Pillow."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    interpolation = functional.InterpolationMode[filter_]
    resized = functional.resize(tensor, [size], interpolation=interpolation, antialias=antialias)
    return functional.center_crop(resized, [size]).round().clamp(0, 255).permute(1, 2, 0).numpy()


def limits() -> dict[str, float]:
    """In levels, by the name of the image."""
    return {image.name: LOSSLESS_LEVELS if image.lossless else JPEG_LEVELS for image in reference_images()}


@pytest.mark.parametrize("size", SIZES)
def test_another_correct_resizer_is_within_the_limits(size: int) -> None:
    found = levels(by_torchvision, size, list(limits()))
    assert all(difference <= limits()[name] for name, difference in found.items()), found


MISTAKES: dict[str, Callable[[Image.Image, int], np.ndarray]] = {
    "bilinear": lambda image, size: by_torchvision(image, size, filter_="BILINEAR"),
    "no antialiasing": lambda image, size: by_torchvision(image, size, antialias=False),
    "nearest": lambda image, size: by_torchvision(image, size, filter_="NEAREST"),
    "squashed": lambda image, size: np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int),
    "channels reversed": lambda image, size: by_torchvision(image, size)[:, :, ::-1],
    "one pixel off": lambda image, size: np.roll(by_torchvision(image, size), 1, axis=1),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_resizer_is_beyond_the_limit_of_an_image(mistake: str, size: int) -> None:
    found = levels(MISTAKES[mistake], size, ("odd", "photo"))
    assert any(difference > limits()[name] for name, difference in found.items()), found


def test_a_decoder_without_exif_alpha_or_high_bytes_is_beyond_the_limit() -> None:
    """What Pillow itself gives for the pixels: colours without alpha, the low bytes, and no rotation."""
    by_name = {image.name: image.content for image in reference_images()}
    with opened(by_name["palette"]) as file:
        colours = np.asarray(file.convert("RGBA"))[:, :, :3]
    with opened(by_name["deep"]) as file:
        low_bytes = np.repeat((np.asarray(file) & 0xFF)[:, :, None], 3, axis=2)
    for name, wrong in (("palette", colours), ("deep", low_bytes)):
        assert np.abs(wrong.astype(int) - np.asarray(open_image(by_name[name]))).max() > limits()[name]
    with opened(by_name["rotated"]) as file:
        assert file.convert("RGB").size != open_image(by_name["rotated"]).size
