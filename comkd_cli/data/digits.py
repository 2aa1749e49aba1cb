"""Handwritten digits that ship with scikit-learn: real images that need no download.

1,797 scans of 8 x 8 pixels (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
Machine Learning Repository, 1998).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.edge.images import as_rgb

TEMPLATE = "a photo of the digit {}."
TEST_EVERY = 5  # every fifth image is a test image: 360 of them, against 1,437 to learn from


def digits_source(template: str | None = None) -> Source:
    """The digits with their fixed split: every fifth image, from the first, is for testing."""
    targets = _bunch().target
    test = [i for i in range(len(targets)) if i % TEST_EVERY == 0]
    train = [i for i in range(len(targets)) if i % TEST_EVERY]
    return Source(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        template=template or TEMPLATE,
        train=_image_set(train, targets),
        test=_image_set(test, targets),
    )


def _image_set(indices: list[int], targets: Any) -> ImageSet:
    return ImageSet(
        keys=tuple(f"{i:04d}" for i in indices),
        labels=tuple(int(targets[i]) for i in indices),
        open_key=_open_digit,
    )


def _open_digit(key: str) -> Image.Image:
    grey = _bunch().images[int(key)] * (255 / 16)  # stored as ink levels 0..16
    return as_rgb(Image.fromarray(grey.astype(np.uint8)))


@cache
def _bunch() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()
