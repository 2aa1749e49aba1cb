"""Checks this machine's decoding, resizing and runtime against the tensors and logits in a bundle's reference/.

Needs numpy and Pillow, and a classifier; it becomes a part of every bundle's predict.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from comkd_cli.edge.images import Preprocessing, UnreadableImage, load_prepared
from comkd_cli.edge.machine import versions
from comkd_cli.edge.manifest import EXPORT_AGAIN, BundleProblem, read_manifest, read_preprocessing, verified_bytes

REFERENCE_FORMAT = "comkd-reference/1"
REFERENCE_FOLDER = "reference"
REFERENCE_FILE = f"{REFERENCE_FOLDER}/reference.json"
TENSORS = "tensors"


class OpenClassifier(Protocol):
    """What is needed of edge.classifier.Classifier, which imports this module."""

    def __call__(self, bundle: Path, threads: int | None = None, precision: str | None = None) -> RunsTensors:
        """The classifier of a bundle. Raises BundleProblem."""
        ...


class RunsTensors(Protocol):
    """A classifier of prepared images."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (batch, classes) of prepared images, float32 (batch, 3, size, size). Raises BundleProblem."""
        ...


@dataclass(frozen=True)
class Check:
    """How far this machine is from the reference in one thing, image by image."""

    name: str
    """`tensors`, or the precision whose logits were compared."""
    differences: Mapping[str, float]
    """Largest |difference| by the image's name; infinite if it could not be computed."""
    limits: Mapping[str, float]
    """Largest allowed difference, by the image's name."""
    unreadable: Mapping[str, str]
    """By the image's name: why it could not be decoded."""
    level: float | None = None
    """For tensors: the largest difference that one level of 255 makes."""

    @property
    def differing(self) -> list[str]:
        """The names of the images that differ beyond the limit. NaN is beyond every limit."""
        return [name for name, value in self.differences.items() if not value <= self.limits[name]]

    @property
    def largest(self) -> float:
        """The largest difference; infinite with NaN or an unreadable image."""
        values = list(self.differences.values())
        return max(values) if all(map(np.isfinite, values)) else float("inf")

    def document(self) -> dict[str, Any]:
        """As plain data for JSON, which has no infinity: null stands for it."""
        finite = {name: value if np.isfinite(value) else None for name, value in self.differences.items()}
        largest = self.largest if np.isfinite(self.largest) else None
        plain = {**asdict(self), "differences": finite, "largest": largest, "differing": self.differing}
        if self.level is None:
            plain = {name: value for name, value in plain.items() if name not in ("level", "unreadable")}
        return plain

    def text(self) -> str:
        """The check in one line, and a line for each image that could not be decoded."""
        levels = "" if self.level is None else f", {self.largest / self.level:.2g} levels of 255"
        line = f"{self.name:8} largest difference {self.largest:.2g}{levels} (limit {_range(self.limits.values())}): "
        line += f"FAILED for {', '.join(self.differing)}" if self.differing else "ok"
        return "\n".join([line, *(f"  {name}: {reason}" for name, reason in self.unreadable.items())])


@dataclass(frozen=True)
class SelfTest:
    """The checks of a bundle on this machine."""

    checks: Sequence[Check]
    made_with: Mapping[str, str]
    """The versions that the reference was made with."""
    runs_with: Mapping[str, str]

    @property
    def differing(self) -> list[str]:
        """The names of all images that differ in anything."""
        return list(dict.fromkeys(name for check in self.checks for name in check.differing))

    def document(self) -> dict[str, Any]:
        """All figures as plain data."""
        return {
            "passed": not self.differing,
            "checks": [check.document() for check in self.checks],
            "reference_made_with": dict(self.made_with),
            "runs_with": dict(self.runs_with),
        }

    def text(self) -> str:
        """The checks, a line each, with the versions if they differ."""
        lines = [check.text() for check in self.checks]
        if self.differing and dict(self.made_with) != dict(self.runs_with):
            lines.append(f"the reference was made with {_named(self.made_with)}; this is {_named(self.runs_with)}")
        return "\n".join(lines)


def run_self_test(bundle: Path, precision: str | None, open_classifier: OpenClassifier) -> SelfTest:
    """Compare what this machine computes with a bundle's reference/.

    The logits are computed from the reference's tensors, so that a difference in them comes only from the runtime.
    precision: None checks each of the bundle. Raises BundleProblem, as for a bundle of an older version, which has no
    reference.
    """
    manifest = read_manifest(bundle)
    reference = _Reference.read(bundle, manifest)
    checks = [reference.check_tensors(read_preprocessing(bundle, manifest))]
    for name in [precision] if precision else list(manifest["precisions"]):
        checks.append(reference.check_logits(name, open_classifier(bundle, precision=name)))
    return SelfTest(checks, reference.made_with, versions())


@dataclass(frozen=True)
class _Image:
    """An image of the reference."""

    name: str
    file: str
    tensor: str
    limit: float
    """Of a difference from the tensor."""


class _Reference:
    """The reference/ of a bundle."""

    def __init__(self, folder: Path, manifest: dict[str, Any], document: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for a document that is not what REFERENCE_FORMAT says."""
        self._folder, self._manifest = folder, manifest
        self.made_with = {str(name): str(version) for name, version in document["made_with"].items()}
        self._images = [
            _Image(str(image["name"]), str(image["file"]), str(image["tensor"]), float(image["tensor_limit"]))
            for image in document["images"]
        ]
        self._logits = {str(name): (str(e["file"]), float(e["limit"])) for name, e in document["logits"].items()}

    @classmethod
    def read(cls, folder: Path, manifest: dict[str, Any]) -> _Reference:
        """Raises BundleProblem."""
        if REFERENCE_FILE not in manifest["files"]:
            raise BundleProblem(
                f"names no {REFERENCE_FILE} to check against, because an older comkd exported the bundle",
                path=folder / "manifest.json",
                field="files",
                remedy=EXPORT_AGAIN,
            )
        path = folder / REFERENCE_FILE
        if not path.is_file():
            raise BundleProblem("was removed; --self-test compares with it", path=path, remedy=EXPORT_AGAIN)
        content = verified_bytes(folder, manifest, REFERENCE_FILE)
        try:
            document = json.loads(content)
            if document["format"] == REFERENCE_FORMAT:
                return cls(folder, manifest, document)
            found = document["format"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleProblem(f"is damaged: {error!r}", path=path, remedy=EXPORT_AGAIN) from error
        raise BundleProblem(
            "has a different format",
            path=path,
            field="format",
            found=found,
            allowed=REFERENCE_FORMAT,
            remedy="run the bundle's own predict.py --self-test",
        )

    def check_tensors(self, preprocessing: Preprocessing) -> Check:
        """Decode and prepare each image as predict.py does. Raises BundleProblem."""
        differences, unreadable = {}, {}
        for image in self._images:
            expected, content = self._array(image.tensor), self._bytes(image.file)
            try:
                prepared = load_prepared(content, preprocessing)[None]
            except UnreadableImage as error:
                differences[image.name], unreadable[image.name] = float("inf"), str(error)
            else:
                differences[image.name] = _largest_difference(prepared, expected)
        limits = {image.name: image.limit for image in self._images}
        return Check(TENSORS, differences, limits, unreadable, level=1 / 255 / min(preprocessing.std))

    def check_logits(self, precision: str, classifier: RunsTensors) -> Check:
        """Run the graph of a precision on each tensor of the reference. Raises BundleProblem."""
        if precision not in self._logits:
            raise BundleProblem(
                "missing", path=self._folder / REFERENCE_FILE, field=f"logits.{precision}", remedy=EXPORT_AGAIN
            )
        file, limit = self._logits[precision]
        expected = self._array(file)
        differences = {
            image.name: _largest_difference(classifier.logits(self._array(image.tensor)), expected[i : i + 1])
            for i, image in enumerate(self._images)
        }
        return Check(precision, differences, dict.fromkeys(differences, limit), {})

    def _bytes(self, name: str) -> bytes:
        return verified_bytes(self._folder, self._manifest, f"{REFERENCE_FOLDER}/{name}")

    def _array(self, name: str) -> np.ndarray:
        """Raises BundleProblem."""
        try:
            return np.asarray(np.load(io.BytesIO(self._bytes(name)), allow_pickle=False))
        except ValueError as error:
            path = self._folder / REFERENCE_FOLDER / name
            raise BundleProblem(f"is damaged: {error}", path=path, remedy=EXPORT_AGAIN) from error


def _largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Infinite for arrays of different shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - expected).max())


def _range(limits: Iterable[float]) -> str:
    """`0.015`, or `0.015 to 0.06`."""
    ends = sorted(limits)
    return " to ".join(dict.fromkeys(f"{limit:.2g}" for limit in (ends[0], ends[-1])))


def _named(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
