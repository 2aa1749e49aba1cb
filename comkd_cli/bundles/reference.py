"""A bundle's reference/: images with their tensors and logits, which other machines and languages check against.

`predict.py --self-test` is the check; docs/bundle.md shows it in C++ and in JavaScript.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.bundles.gates import GATES
from comkd_cli.bundles.reference_images import LICENSE, ReferenceImage, reference_images
from comkd_cli.bundles.runner import run_graph
from comkd_cli.edge.images import Preprocessing, load_prepared
from comkd_cli.edge.machine import versions
from comkd_cli.edge.self_test import REFERENCE_FILE, REFERENCE_FOLDER, REFERENCE_FORMAT
from comkd_cli.errors import ExportError
from comkd_cli.files import write_text

# Of 255, measured on the eight images at 16 to 336 pixels. A resizer that keeps fractions where Pillow rounds and clips
# between its two passes differs by up to 6 levels, Pillow 12 from Pillow 13 by 3; other decoders of JPEG by 3 more. A
# bilinear filter, or none against aliasing, differs by at least 8 on one of the lossless images.
LOSSLESS_LEVELS, JPEG_LEVELS = 6.5, 9.5
SAMPLES_PER_SIDE = 5
SHARE_OF_GATE = 0.25
"""A runtime's distance from the reference, of what the gate lets a graph be away from PyTorch."""


class ReferenceWriter:
    """Computes the tensors and logits of the reference images, and writes reference/ into a bundle."""

    def __init__(self, preprocessing: Preprocessing, logit_scale: float, extra: Mapping[str, np.ndarray]) -> None:
        """extra: the graphs' inputs besides the image."""
        self._preprocessing, self._scale, self._extra = preprocessing, logit_scale, extra
        self._images = reference_images()
        self._tensors = {image.name: load_prepared(image.content, preprocessing)[None] for image in self._images}
        self._logits: dict[str, _Logits] = {}

    def add_precision(self, precision: str, classifier: Path, optimization: str) -> None:
        """Run a precision's classifier on each tensor, in a process of its own.

        optimization: onnxruntime's level, as the manifest records it. Raises ExportError if the graph could not be run
        or a logit is not finite.
        """
        found = run_graph(classifier, self._tensors, self._extra, optimization)
        logits = np.concatenate([found[image.name] for image in self._images]).astype(np.float32)
        if not np.isfinite(logits).all():
            raise ExportError("its logits for a reference image are not finite", path=classifier.name)
        self._logits[precision] = _Logits(logits, optimization, logit_limit(precision, self._scale))

    def write(self, folder: Path, precisions: Iterable[str]) -> None:
        """Write reference/ into a bundle's folder, with the logits of these precisions."""
        target = folder / REFERENCE_FOLDER
        target.mkdir()
        for image in self._images:
            (target / image.file).write_bytes(image.content)
            np.save(target / f"{image.name}.npy", self._tensors[image.name].astype("<f4"))
        for precision in precisions:
            np.save(target / _logits_file(precision), self._logits[precision].values.astype("<f4"))
        document = {
            "format": REFERENCE_FORMAT,
            "license": LICENSE,
            "made_by": f"comkd {version('comkd')}",
            "made_with": versions(),
            "images": [self._image(image) for image in self._images],
            "logits": {precision: self._logits[precision].document(precision) for precision in precisions},
        }
        write_text(folder / REFERENCE_FILE, json.dumps(document) + "\n")

    def _image(self, image: ReferenceImage) -> dict[str, Any]:
        tensor = self._tensors[image.name]
        levels = LOSSLESS_LEVELS if image.lossless else JPEG_LEVELS
        return {
            "name": image.name,
            "file": image.file,
            "shows": image.shows,
            "tensor": f"{image.name}.npy",
            "tensor_limit": levels / 255 / min(self._preprocessing.std),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor.astype("<f4").tobytes()).hexdigest(),
            "channel_means": [float(mean) for mean in tensor.mean(axis=(0, 2, 3), dtype=np.float64)],
            "samples": _samples(tensor),
        }


@dataclass(frozen=True)
class _Logits:
    """The logits of a precision."""

    values: np.ndarray
    """float32 (images, classes)."""
    optimization: str
    limit: float

    def document(self, precision: str) -> dict[str, Any]:
        """As plain data."""
        values = [[_shortest(value) for value in row] for row in self.values]
        file = _logits_file(precision)
        return {"file": file, "optimization": self.optimization, "limit": self.limit, "values": values}


def logit_limit(precision: str, logit_scale: float) -> float:
    """The largest |difference| of a logit between two correct runtimes.

    Unit features with a cosine of c are sqrt(2 (1 - c)) apart, and a logit of a unit class vector is at most
    logit_scale times that away. c: the smallest cosine with PyTorch that the precision's default gate allows.
    """
    return SHARE_OF_GATE * logit_scale * math.sqrt(2 * (1 - GATES[precision].cosine_min))


def _logits_file(precision: str) -> str:
    return f"logits.{precision}.npy"


def _samples(tensor: np.ndarray) -> list[list[float]]:
    """[channel, row, column, value] at the crossings of a grid."""
    size = tensor.shape[2]
    grid = sorted({(2 * i + 1) * size // (2 * SAMPLES_PER_SIDE) for i in range(SAMPLES_PER_SIDE)})
    return [[c, y, x, _shortest(tensor[0, c, y, x])] for c in range(3) for y in grid for x in grid]


def _shortest(value: np.float32) -> float:
    """A number with as few digits as identify the float32."""
    return float(str(value))
