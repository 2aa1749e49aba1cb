"""Crops for training, each a pure function of (seed, image, view)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms import functional as tv

from comkd_cli.data.copies import Copy
from comkd_cli.edge.images import RESAMPLING, Preprocessing, normalise, prepare
from comkd_cli.recipe.model import Augment
from comkd_cli.recipe.model import RandAugment as RandAugmentSettings

Region = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of a random crop before it is resized; torchvision's and PromptKD's


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and names, the same on every machine and in every process."""
    text = "/".join(map(str, parts))
    # surrogatepass: file names that are not UTF-8 reach Python as lone surrogates.
    content = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def scoring_input(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """An RGB image as a model's input for scoring: float32 (3, size, size), resized and centre-cropped."""
    return torch.from_numpy(prepare(image, preprocessing))


def training_inputs(
    image: Image.Image | Copy, preprocessings: Sequence[Preprocessing], augment: Augment, seed: int
) -> list[Tensor]:
    """One random crop of an RGB image, or of its copy, as the input of each of several models.

    The models may differ in input size, but see the same region of the image, mirrored in the same way: the
    teacher's features must be of the student's view. The region is drawn in pixels of the original, so that a copy
    gives the crop of the same region. Returns float32 (3, size, size) each; equal pre-processings share one tensor. The
    global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        region = RandomResizedCrop.get_params(_of_size(image), [augment.min_scale, 1.0], list(ASPECT_RATIOS))
        mirrored = augment.flip and bool(torch.rand(()) < 0.5)
        if augment.rand_augment is not None:
            image, region = _changed(image, region, augment.rand_augment)
    inputs: dict[Preprocessing, Tensor] = {}
    for preprocessing in preprocessings:
        if preprocessing not in inputs:
            crop = _resized(image, region, preprocessing)
            inputs[preprocessing] = torch.from_numpy(normalise(crop[:, ::-1] if mirrored else crop, preprocessing))
    return [inputs[preprocessing] for preprocessing in preprocessings]


def _of_size(image: Image.Image | Copy) -> Image.Image | Tensor:
    """The object from which torchvision reads the size."""
    return torch.empty(()).expand(3, *image.size[::-1]) if isinstance(image, Copy) else image


def _resized(image: Image.Image | Copy, region: Region, preprocessing: Preprocessing) -> np.ndarray:
    """A region of an image as a model's square input, uint8 (size, size, 3)."""
    size = [preprocessing.size] * 2
    if not isinstance(image, Copy):
        return np.asarray(tv.resized_crop(image, *region, size, InterpolationMode(preprocessing.interpolation)))
    part, box = image.part(region)
    if image.is_whole:
        # torch's antialiased resizing of bytes is Pillow's arithmetic, up to four times as fast and at most a few
        # levels different, in one of a hundred. It does not resize from fractions of pixels.
        pixels = torch.from_numpy(part).permute(2, 0, 1)[None]
        resized = functional.interpolate(pixels, size, mode=preprocessing.interpolation, antialias=True)
        return resized[0].permute(1, 2, 0).numpy()
    resampling = RESAMPLING[preprocessing.interpolation]
    return np.asarray(Image.fromarray(part).resize((preprocessing.size, preprocessing.size), resampling, box=box))


def _changed(image: Image.Image | Copy, region: Region, settings: RandAugmentSettings) -> tuple[Image.Image, Region]:
    """The region of an image after RandAugment, and the region that is all of it; draws from torch's generator.

    It is changed before it is resized: models of different input sizes then see one change. Of a copy the region is
    rounded to whole pixels.
    """
    if isinstance(image, Copy):
        part, (left, top, right, bottom) = image.part(region)
        crop = Image.fromarray(part).crop((round(left), round(top), round(right), round(bottom)))
    else:
        crop = tv.crop(image, *region)
    change = RandAugment(settings.operations, settings.magnitude, interpolation=InterpolationMode.BILINEAR)
    return change(crop), (0, 0, crop.height, crop.width)
