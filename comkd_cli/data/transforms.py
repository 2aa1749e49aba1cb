"""Crops for training, each a pure function of (seed, image, view)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms import functional as tv

from comkd_cli.edge.images import Preprocessing, normalise, prepare
from comkd_cli.recipe.model import Augment
from comkd_cli.recipe.model import RandAugment as RandAugmentSettings

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
    image: Image.Image, preprocessings: Sequence[Preprocessing], augment: Augment, seed: int
) -> list[Tensor]:
    """One random crop of an RGB image, as the input of each of several models.

    The models may differ in input size, but see the same region of the image, mirrored in the same way: the
    teacher's features must be of the student's view. Returns float32 (3, size, size) each; equal
    pre-processings share one tensor. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        region = RandomResizedCrop.get_params(image, [augment.min_scale, 1.0], list(ASPECT_RATIOS))
        mirrored = augment.flip and bool(torch.rand(()) < 0.5)
        if augment.rand_augment is not None:
            image, region = _changed(image, region, augment.rand_augment)
    inputs: dict[Preprocessing, Tensor] = {}
    for preprocessing in preprocessings:
        if preprocessing not in inputs:
            interpolation = InterpolationMode(preprocessing.interpolation)
            crop = tv.resized_crop(image, *region, [preprocessing.size] * 2, interpolation)
            crop = tv.hflip(crop) if mirrored else crop
            inputs[preprocessing] = torch.from_numpy(normalise(crop, preprocessing))
    return [inputs[preprocessing] for preprocessing in preprocessings]


def _changed(
    image: Image.Image, region: tuple[int, int, int, int], settings: RandAugmentSettings
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The region of an image after RandAugment, and the region that is all of it; draws from torch's generator.

    It is changed before it is resized: models of different input sizes then see one change.
    """
    top, left, height, width = region
    change = RandAugment(settings.operations, settings.magnitude, interpolation=InterpolationMode.BILINEAR)
    return change(tv.crop(image, top, left, height, width)), (0, 0, height, width)
