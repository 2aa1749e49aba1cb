"""Sets of images, and sources: the common interface of all datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from comkd_cli.data.contents import Contents
from comkd_cli.data.copies import Copies, Copy
from comkd_cli.data.holdout import Holdout
from comkd_cli.data.prompts import Prompts
from comkd_cli.edge.images import CONVERSION, Conversion, UnreadableImage
from comkd_cli.files import sha256_of_data
from comkd_cli.recipe.data import UNLABELLED


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, opened one at a time."""

    keys: Sequence[str]
    """A name for each image that stays the same from run to run: its path below the folder."""
    labels: tuple[int, ...] | None
    """For each image the index of its class, or UNLABELLED (-1) if it has none; None if none of the set has one.
    Only training images can have labels in part."""
    open_key: Callable[[str], Image.Image]
    """The RGB image of a key; picklable, so that worker processes can also open images."""
    contents: Contents | None = field(default=None, compare=False)
    """Digests of what the images contain. None: of their decoded pixels."""
    copies: Copies | None = field(default=None, compare=False)
    """What random crops are cut from; None: from the images. A subset has none."""
    conversion: Conversion = CONVERSION
    """How `open_key` converts the files."""

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, index: int) -> Image.Image:
        """The image at a position, as RGB. Raises UnreadableImage."""
        return self.open_key(self.keys[index])

    def open_to_crop(self, index: int) -> Image.Image | Copy:
        """What random crops of the image at a position are cut from. Raises UnreadableImage."""
        return self.open(index) if self.copies is None else self.copies.open(index)

    def subset(self, indices: list[int]) -> ImageSet:
        """The images at these positions, in this order."""
        return ImageSet(
            keys=tuple(self.keys[i] for i in indices),
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
            open_key=self.open_key,
            contents=self.contents,
            conversion=self.conversion,
        )

    @property
    def labelled_count(self) -> int:
        """The number of images with a label."""
        return sum(label != UNLABELLED for label in self.labels or ())

    @property
    def labelled(self) -> ImageSet:
        """The images with a label, in their order; this set itself if all have one."""
        labels = self.labels or ()
        if self.labels is not None and UNLABELLED not in labels:
            return self
        return self.subset([index for index, label in enumerate(labels) if label != UNLABELLED])

    @cached_property
    def digest(self) -> str:
        """A sha256 of the names and contents of the images, in order, by which sets of images are compared.

        It does not depend on the folder or on labels, but on `conversion` if that is not the default. Reads every
        file whose digest is not remembered.
        """
        digest = hashlib.sha256()
        if self.conversion != CONVERSION:
            digest.update(sha256_of_data(asdict(self.conversion)).encode())
        for key, content in zip(self.keys, self.content_digests(), strict=True):
            name = key.encode("utf-8", "surrogatepass")  # names that are not UTF-8 reach Python as lone surrogates
            digest.update(len(name).to_bytes(4, "big") + name + content)
        return digest.hexdigest()

    @property
    def ordered_digest(self) -> str:
        """As `digest`, but also dependent on the order of the images; for data that is stored by position."""
        return self.digest

    def content_digests(self) -> Iterator[bytes]:
        """A digest of what each image contains, in order. Reads every file whose digest is not remembered."""
        return self._pixel_digests() if self.contents is None else self.contents.digests(self.keys)

    def _pixel_digests(self) -> Iterator[bytes]:
        for index in range(len(self)):
            try:
                picture = self.open(index)
                yield hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
            except UnreadableImage as error:
                yield hashlib.sha256(f"unreadable: {error}".encode("utf-8", "surrogatepass")).digest()

    def spaced(self, most: int) -> Sequence[int]:
        """The positions of about `most` images, evenly spaced."""
        return range(0, len(self), max(1, len(self) // most))

    @property
    def rows(self) -> np.ndarray | None:
        """The row of each image in stored data, int64 (images,); None: its position."""
        return None

    @property
    def runs_on_disk(self) -> np.ndarray | None:
        """Where each run of adjacent images begins, and where the last ends, int64 (runs + 1,).

        None if images can be read in any order at the same cost.
        """
        return None


def evenly_spaced(images: ImageSet, most: int) -> list[int]:
    """The positions of at most `most` images, spread over the whole set."""
    positions = images.spaced(most)
    chosen = np.linspace(0, len(positions) - 1, min(most, len(positions))).astype(np.int64)
    return [int(positions[place]) for place in chosen]


@dataclass(frozen=True)
class Source:
    """Classes, their prompts, and the images for training and scoring."""

    name: str
    class_names: tuple[str, ...]
    template: str
    """The prompt of a class, or the first of several; `{}` stands for the class name."""
    train: ImageSet
    test: ImageSet | None
    val: ImageSet | None = None
    """Labelled images to choose few-shot settings on; only the suite's datasets have them."""
    ensemble: Prompts | None = None
    """Several templates, or descriptions of single classes; None: only `template`."""
    holdout: Holdout | None = None
    """How `test` was held out of the training images; None if the dataset has test images of its own, or none."""

    @property
    def wording(self) -> Prompts:
        """All prompts of the classes."""
        return self.ensemble or Prompts((self.template,))

    @property
    def test_name(self) -> str:
        """What messages call the images of `test`."""
        return "test images" if self.holdout is None else "held-out images"

    @property
    def prompts(self) -> list[str]:
        """The first prompt of each class, in the order of the labels."""
        return [self.wording.of(name)[0] for name in self.class_names]

    def identity(self) -> dict[str, Any]:
        """What determines training on it, as named plain data: classes, prompts, and the images with their labels.

        `templates`, `descriptions` and `conversion` exist only if a recipe sets them.
        """
        labels = self.train.labels
        prompts = self.wording
        several = {"templates": list(prompts.templates)} if len(prompts.templates) > 1 else {}
        described = {name: list(texts) for name, texts in prompts.descriptions.items()}
        return {
            "class_names": list(self.class_names),
            "template": self.template,
            **several,
            **({"descriptions": described} if described else {}),
            **({"conversion": asdict(self.train.conversion)} if self.train.conversion != CONVERSION else {}),
            "training_images": self.train.digest,
            "training_labels": None if labels is None else sha256_of_data(list(labels)),
        }
