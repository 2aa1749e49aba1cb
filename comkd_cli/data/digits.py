"""Handwritten digits that ship with scikit-learn: real images that need no download.

1,797 scans of 8 x 8 pixels (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
Machine Learning Repository, 1998).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.edge.images import as_rgb

TEMPLATE = "a photo of the digit {}."
FILE = "datasets/data/digits.csv.gz"  # of scikit-learn
TEST_EVERY = 5  # every fifth image is a test image: 360 of them, against 1,437 to learn from


def digits_source(template: str | None = None) -> Source:
    """The digits with their fixed split: every fifth image, from the first, is for testing."""
    _, targets = _scans()
    test = [i for i in range(len(targets)) if i % TEST_EVERY == 0]
    train = [i for i in range(len(targets)) if i % TEST_EVERY]
    return Source(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        template=template or TEMPLATE,
        train=_image_set(train, targets),
        test=_image_set(test, targets),
    )


def _image_set(indices: list[int], targets: np.ndarray) -> ImageSet:
    return ImageSet(
        keys=tuple(f"{i:04d}" for i in indices),
        labels=tuple(int(targets[i]) for i in indices),
        open_key=_open_digit,
    )


def _open_digit(key: str) -> Image.Image:
    images, _ = _scans()
    grey = images[int(key)] * (255 / 16)  # stored as ink levels 0..16
    return as_rgb(Image.fromarray(grey.astype(np.uint8)))


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Ink levels from 0 to 16, (1797, 8, 8), and the digits that they show, (1797,).

    Read from scikit-learn's file without importing scikit-learn, which takes seconds. A version that has moved the file
    is imported and reads it.
    """
    package = find_spec("sklearn")
    file = Path(next(iter(package.submodule_search_locations or ()), ""), FILE) if package else Path(FILE)
    if not file.is_file():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.images, bunch.target
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
