"""The real images of an export, in disjoint parts: to calibrate int8, to choose its method, and for the gate.

fit_part.py takes one more part from the gate's.

A figure from images that were also used to make or to choose the graph would be optimistically biased. Images are
compared by their prepared pixels: copies of a file, also in another lossless format, are one image.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing, UnreadableImage, prepare
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Progress, Report

# With more than 144 images the ranges of activations hardly change; a mean cosine over 48 distinguishes the methods.
MOST_TO_CALIBRATE, MOST_TO_CHOOSE = 144, 48
# A whole calibration batch; for the others more than the largest of the gate's small batches. Confidence intervals of
# so few images are wide, and are printed; figures of fewer would be meaningless.
LEAST_TO_CALIBRATE, LEAST_TO_CHOOSE, LEAST_FOR_GATE = 16, 8, 8
MOST_NAMED = 10
SPARE = 100

Origin = Literal["test", "training", "given", "negative"]
ORIGINS: dict[Origin, str] = {
    "test": "test images",
    "training": "training images",
    "given": "images given with --images",
    "negative": "images given with --negatives",
}


def _name_of(origin: Origin, held_out: bool) -> str:
    return "held-out images" if held_out else ORIGINS[origin]


@dataclass(frozen=True)
class Pool:
    """Images that parts are taken from."""

    images: ImageSet
    origin: Origin
    held_out: bool = False
    """Whether `test` images are training images that were held out."""

    @property
    def name(self) -> str:
        """What messages call its images."""
        return _name_of(self.origin, self.held_out)


@dataclass(frozen=True)
class PartSize:
    """The number of images in a part, and their origin."""

    images: int
    different: int
    """Without copies."""
    origin: Origin
    labels: bool
    held_out: bool = False
    """Whether `test` images are training images that were held out."""

    def words(self, scored: bool = False) -> str:
        """`360 test images`; with `scored`, for images that figures are of, `48 training images, not held out`."""
        name = _name_of(self.origin, self.held_out)
        if self.images == 1:
            name = name.replace("images", "image", 1)
        copies = f" ({self.different} different ones)" if self.different < self.images else ""
        return f"{self.images} {name}{copies}{', not held out' if scored and self.origin == 'training' else ''}"


@dataclass(frozen=True)
class Part:
    """Prepared images for one purpose."""

    images: np.ndarray
    """float32 (images, 3, size, size)."""
    origin: Origin
    labels: np.ndarray | None = None
    """int64 (images,), of held-out images only; otherwise None."""
    different: int = 0
    """Number of images without copies."""
    held_out: bool = False
    """As `Pool.held_out`."""
    pictures: ImageSet | None = None
    """The same images, to prepare them for another model."""

    @property
    def size(self) -> PartSize:
        """The manifest's entry of the part."""
        return PartSize(len(self.images), self.different, self.origin, self.labels is not None, self.held_out)


@dataclass(frozen=True)
class Parts:
    """Parts without a common image."""

    gate: Part
    choose: Part
    calibrate: Part
    unreadable: int
    """Number of images that could not be read."""
    too_few: str | None
    """Why there are too few images for int8; None if there are enough or int8 is not exported."""
    fit: Part | None = None
    """To fit the temperature and the threshold; None if there are too few unseen images. See fit_part.py."""
    no_fit: str | None = None
    """Why there is no such part."""


@dataclass
class _Readings:
    """Images of a pool with the digests of their contents, and the errors of those that could not be read."""

    digests: list[bytes] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.digests)

    def by_content(self) -> list[int]:
        """The readings in the order of their digests, which depends on their contents alone."""
        return sorted(range(len(self)), key=lambda number: (self.digests[number], self.positions[number]))

    def by_position(self) -> list[int]:
        """The readings in the order of the pool."""
        return sorted(range(len(self)), key=lambda number: self.positions[number])


def read_parts(
    gate_pool: Pool, other_pool: Pool, preprocessing: Preprocessing, most_for_gate: int, int8: bool, report: Report
) -> Parts:
    """Read the gate's images from one pool and those to calibrate and to choose from the other, or all from one.

    int8: whether images to calibrate and to choose are needed; without them every image goes to the gate. Names
    determine which images of a large pool are read, and contents determine the part of an image; the order of a
    directory listing does not matter. Only held-out images keep their labels. Raises DataError if no image could be
    read.
    """
    reader = _PartReader(preprocessing, most_for_gate, report)
    if not int8:
        return reader.gate_alone(gate_pool, other_pool)
    if gate_pool.images is not other_pool.images:
        return reader.from_two(gate_pool, other_pool)
    return reader.from_one(gate_pool)


class _PartReader:
    """Reads pools and divides them into parts. most_for_gate: the largest number of images for the gate."""

    def __init__(self, preprocessing: Preprocessing, most_for_gate: int, report: Report) -> None:
        self._preprocessing, self._most_for_gate, self._report = preprocessing, most_for_gate, report

    def gate_alone(self, gate_pool: Pool, other_pool: Pool) -> Parts:
        """The gate from the one pool; the other parts are empty."""
        gate = self._read_gate(gate_pool)
        return Parts(
            gate=self._part(gate, gate.by_position(), gate_pool),
            choose=self._part(gate, [], other_pool),
            calibrate=self._part(gate, [], other_pool),
            unreadable=len(gate.unreadable),
            too_few=None,
        )

    def from_two(self, gate_pool: Pool, other_pool: Pool) -> Parts:
        """The gate from the one pool, the images to calibrate and to choose from the other."""
        gate = self._read_gate(gate_pool)
        others = self._read(other_pool, MOST_TO_CALIBRATE + MOST_TO_CHOOSE, exclude=set(gate.digests))
        too_few = _too_few_of_two(gate, gate_pool, others, other_pool)
        order = others.by_content() if too_few is None else []
        choose = min(MOST_TO_CHOOSE, max(LEAST_TO_CHOOSE, len(order) // 4))
        return Parts(
            gate=self._part(gate, gate.by_position(), gate_pool),
            choose=self._part(others, order[:choose], other_pool),
            calibrate=self._part(others, order[choose:], other_pool),
            unreadable=len(gate.unreadable) + len(others.unreadable),
            too_few=too_few,
        )

    def from_one(self, pool: Pool) -> Parts:
        """Three parts of one pool."""
        read = self._read(pool, self._most_for_gate + MOST_TO_CALIBRATE + MOST_TO_CHOOSE)
        order = read.by_content()
        choose = min(MOST_TO_CHOOSE, max(LEAST_TO_CHOOSE, len(order) // 8))
        calibrate = min(MOST_TO_CALIBRATE, max(LEAST_TO_CALIBRATE, 3 * len(order) // 8))
        too_few = _too_few_of_one(len(order), pool, self._most_for_gate)
        if too_few is not None:  # all images for the gates of the other precisions
            choose = calibrate = 0
        end = choose + calibrate
        return Parts(
            gate=self._part(read, order[end:][: self._most_for_gate], pool),
            choose=self._part(read, order[:choose], pool),
            calibrate=self._part(read, order[choose:end], pool),
            unreadable=len(read.unreadable),
            too_few=too_few,
        )

    def _part(self, read: _Readings, selected: Sequence[int], pool: Pool) -> Part:
        """Some of the readings of a pool as a part."""
        size, labels = self._preprocessing.size, pool.images.labels if pool.origin == "test" else None
        empty = np.empty((0, 3, size, size), np.float32)
        return Part(
            images=np.stack([read.pixels[i] for i in selected]) if selected else empty,
            origin=pool.origin,
            labels=None if labels is None else np.asarray([labels[read.positions[i]] for i in selected]),
            different=len({read.digests[i] for i in selected}),
            held_out=pool.held_out,
            pictures=pool.images.subset([read.positions[i] for i in selected]),
        )

    def _read_gate(self, pool: Pool) -> _Readings:
        # Labelled copies stay, because they also count in the score of the test images.
        labelled = pool.origin == "test" and pool.images.labels is not None
        return self._read(pool, self._most_for_gate, copies=labelled)

    def _read(self, pool: Pool, most: int, copies: bool = False, exclude: Set[bytes] | None = None) -> _Readings:
        """Up to `most` images of a pool, prepared. copies: keep images with the content of another one.

        exclude: digests of contents to leave out; None for the gate's own images, of which at least one is needed.
        Raises DataError if none could be read.
        """
        read, seen, total = _Readings(), set(exclude or ()), min(most, len(pool.images))
        for position in _candidates(pool.images, most):
            if len(read) == most:
                break
            try:
                pixels = prepare(pool.images.open(position), self._preprocessing)
            except UnreadableImage as error:
                read.unreadable.append(str(error))
                continue
            digest = hashlib.sha256(pixels.tobytes()).digest()
            if digest not in seen or copies:
                seen.add(digest)
                read.digests.append(digest)
                read.positions.append(position)
                read.pixels.append(pixels)
            self._report(Progress("images", len(read), total))
        if read.unreadable:
            names = "".join(f"\n  {problem}" for problem in read.unreadable[:MOST_NAMED])
            count = len(read.unreadable)
            self._report(Notice(f"{count} of the {pool.name} could not be read and are skipped:{names}"))
        if not len(read) and exclude is None:
            raise DataError("none of the images for the checks could be read", remedy="provide others with --images")
        return read


def _too_few_of_two(gate: _Readings, gate_pool: Pool, others: _Readings, other_pool: Pool) -> str | None:
    """Why two pools are too small for int8; None if they are not."""
    if (count := len(set(gate.digests))) < LEAST_FOR_GATE:
        return (
            f"int8 needs at least {LEAST_FOR_GATE} different images for its gate, but only {count} "
            f"{gate_pool.name} could be read; raise --check-images, or provide more with --images"
        )
    if len(others) < LEAST_TO_CALIBRATE + LEAST_TO_CHOOSE:
        return (
            f"int8 needs at least {LEAST_TO_CALIBRATE + LEAST_TO_CHOOSE} different images in addition to those of its "
            f"gate ({LEAST_TO_CALIBRATE} to calibrate, {LEAST_TO_CHOOSE} to choose the method), but only "
            f"{len(others)} other {other_pool.name} could be read; provide more with --images"
        )
    return None


def _too_few_of_one(count: int, pool: Pool, most_for_gate: int) -> str | None:
    """Why a pool is too small for the three parts of int8; None if it is not."""
    least = LEAST_FOR_GATE + LEAST_TO_CALIBRATE + LEAST_TO_CHOOSE
    if count < least:
        return (
            f"int8 needs at least {least} different images, in three parts ({LEAST_FOR_GATE} for its gate, "
            f"{LEAST_TO_CALIBRATE} to calibrate, {LEAST_TO_CHOOSE} to choose the method), but only {count} "
            f"{pool.name} could be read; provide more with --images"
        )
    if most_for_gate < LEAST_FOR_GATE:
        return f"int8 needs at least {LEAST_FOR_GATE} images for its gate; raise --check-images"
    return None


def _candidates(images: ImageSet, most: int) -> Sequence[int]:
    """Up to 2 * `most` + SPARE positions, since some images may be copies or unreadable.

    They are those whose names have the smallest digests, which are spread over the set even if it is sorted by class.
    """
    if images.rows is not None:  # already ranked by such a digest
        return images.spaced(most)

    def rank(position: int) -> bytes:
        return hashlib.sha256(images.keys[position].encode("utf-8", "surrogatepass")).digest()

    return heapq.nsmallest(2 * most + SPARE, range(len(images)), key=rank)
