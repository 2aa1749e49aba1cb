"""A source of images: what every data set looks like to the rest of the code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from comkd_cli.files import sha256_of_data
from comkd_cli.predictor import UnreadableImage


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, opened one at a time."""

    keys: Sequence[str]
    """A name for each image that stays the same from run to run: its path below the folder."""
    labels: tuple[int, ...] | None
    """For each image the index of its class, or None where the set is unlabelled."""
    open_key: Callable[[str], Image.Image]
    """The RGB image of a key; picklable, so that worker processes can open images too."""
    sizes_bytes: tuple[int, ...] = ()
    """For each image the size of its file, where it has one: part of the set's fingerprint."""

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int) -> Image.Image:
        """The image at a position, as RGB. Raises predictor.UnreadableImage."""
        return self.open_key(self.keys[index])

    def subset(self, indices: list[int]) -> ImageSet:
        """The images at these positions, in this order."""
        return ImageSet(
            keys=tuple(self.keys[i] for i in indices),
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
            open_key=self.open_key,
            sizes_bytes=tuple(self.sizes_bytes[i] for i in indices) if self.sizes_bytes else (),
        )

    def identity(self) -> tuple[object, object]:
        """What tells the set from others, as plain data for a digest: its names, and the sizes of its files."""
        return list(self.keys), list(self.sizes_bytes)

    def spaced(self, most: int) -> Sequence[int]:
        """The positions of about `most` images, evenly spaced."""
        return range(0, len(self), max(1, len(self) // most))

    @property
    def rows(self) -> np.ndarray | None:
        """Where what is kept of each image stands, int64 (images,); None: at the image's position."""
        return None

    @property
    def runs_on_disk(self) -> np.ndarray | None:
        """Where each run of images that lie side by side begins, and where the last ends, int64 (runs + 1,).

        None where images can be read in any order at the same cost.
        """
        return None


def sampled_content(images: ImageSet, most: int = 64) -> str:
    """A digest of the pixels of about `most` images, evenly spaced: tells sets apart whose files are called alike."""
    digest = hashlib.sha256()
    for index in images.spaced(most):
        try:
            picture = images.open(index)
            digest.update(repr(picture.size).encode() + picture.tobytes())
        except UnreadableImage:
            digest.update(b"unreadable")
    return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """Classes, the prompt that names them, and the images to learn from and to be scored on."""

    name: str
    class_names: tuple[str, ...]
    template: str
    """`{}` stands for the class name."""
    train: ImageSet
    test: ImageSet | None
    val: ImageSet | None = None
    """Labelled images to choose few-shot settings on; only the suite's data sets have them."""

    @property
    def prompts(self) -> list[str]:
        """The prompt of each class, in the order of the labels."""
        return [self.template.replace("{}", name) for name in self.class_names]

    def fingerprint(self) -> str:
        """A digest of what training sees: classes, prompts, and the training images with their labels.

        Files count by path and size; their content is not read, which a large set could not afford.
        """
        keys, sizes = self.train.identity()
        return sha256_of_data([self.prompts, keys, list(self.train.labels or ()), sizes])
