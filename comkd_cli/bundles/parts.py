"""The real images of an export, in parts that share none: to calibrate int8, to choose its way, and for the gate.

A figure from images that were also used to make or to choose the graph would be too good. Images are told apart by
what a model sees of them: copies of a file, and the same picture in another lossless format, are one image.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing, UnreadableImage, prepare
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Progress, Report

# With 144 images the ranges of activations no longer move; a mean cosine over 48 tells ways to int8 apart.
MOST_TO_CALIBRATE, MOST_TO_CHOOSE = 144, 48
# A whole calibration batch; and for the others more than the largest of the gate's small batches. From so few the
# intervals beside the figures are wide, which is said; from fewer the figures would mean nothing.
LEAST_TO_CALIBRATE, LEAST_TO_CHOOSE, LEAST_FOR_GATE = 16, 8, 8
MOST_NAMED = 10
SPARE = 100

Origin = Literal["test", "training", "given"]
ORIGINS: dict[Origin, str] = {
    "test": "test images",
    "training": "training images",
    "given": "images given with --images",
}


@dataclass(frozen=True)
class Pool:
    """Images that parts are taken from."""

    images: ImageSet
    origin: Origin


@dataclass(frozen=True)
class PartSize:
    """How many images a part has, and where they are from."""

    images: int
    different: int
    """Without those that show exactly what another one shows."""
    origin: Origin
    labels: bool

    def words(self, scored: bool = False) -> str:
        """`360 test images`; where figures are of them, `48 training images, not held out`."""
        what = ORIGINS[self.origin] if self.images != 1 else ORIGINS[self.origin].replace("images", "image", 1)
        copies = f" ({self.different} different ones)" if self.different < self.images else ""
        return f"{self.images} {what}{copies}{', not held out' if scored and self.origin == 'training' else ''}"


@dataclass(frozen=True)
class Part:
    """Prepared images for one purpose."""

    images: np.ndarray
    """float32 (images, 3, size, size)."""
    origin: Origin
    labels: np.ndarray | None = None
    """int64 (images,), of held-out images alone; None without."""
    different: int = 0
    """How many of the images differ from all others."""

    @property
    def size(self) -> PartSize:
        """What a manifest says of the part."""
        return PartSize(len(self.images), self.different, self.origin, self.labels is not None)


@dataclass(frozen=True)
class Parts:
    """Disjoint parts: what one of them shows, none of the others shows."""

    gate: Part
    choose: Part
    calibrate: Part
    unreadable: int
    """Images that were met and could not be read."""
    too_few: str | None
    """Why int8 can't be made and tested with these images, where it was asked for; None where it can."""


@dataclass
class _Readings:
    """Images of a pool that were read, each with the digest of its content, and what could not be read."""

    digests: list[bytes] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.digests)

    def by_content(self) -> list[int]:
        """The readings in the order of their digests, which depends on what they show alone."""
        return sorted(range(len(self)), key=lambda number: (self.digests[number], self.positions[number]))

    def part(self, chosen: Sequence[int], pool: Pool, preprocessing: Preprocessing) -> Part:
        """Some of the readings as a part."""
        size, labels = preprocessing.size, pool.images.labels if pool.origin == "test" else None
        return Part(
            images=np.stack([self.pixels[i] for i in chosen]) if chosen else np.empty((0, 3, size, size), np.float32),
            origin=pool.origin,
            labels=None if labels is None else np.asarray([labels[self.positions[i]] for i in chosen]),
            different=len({self.digests[i] for i in chosen}),
        )


def read_parts(
    gate_pool: Pool, other_pool: Pool, preprocessing: Preprocessing, most_for_gate: int, int8: bool, report: Report
) -> Parts:
    """The gate's images from one pool, those to calibrate and to choose on from the other, or all from one.

    int8: whether images to calibrate and to choose are needed; without them every image goes to the gate. Which
    images are taken of a large pool depends on their names, and to which part one goes on what it shows; the order
    in which a folder lists them counts for neither. Labels count for held-out images alone. Raises DataError where
    no image can be read.
    """
    if not int8 or gate_pool.images is not other_pool.images:
        return _from_two(gate_pool, other_pool, preprocessing, most_for_gate, int8, report)
    return _from_one(gate_pool, preprocessing, most_for_gate, report)


def _from_two(
    gate_pool: Pool, other_pool: Pool, preprocessing: Preprocessing, most_for_gate: int, int8: bool, report: Report
) -> Parts:
    # Labelled copies stay: they count in the score of the test images, too.
    labelled = gate_pool.origin == "test" and gate_pool.images.labels is not None
    gate = _read(gate_pool, most_for_gate, preprocessing, report, copies=labelled)
    others = _Readings()
    if int8:
        most = MOST_TO_CALIBRATE + MOST_TO_CHOOSE
        others = _read(other_pool, most, preprocessing, report, apart_from=set(gate.digests))
    too_few = _too_few_of_two(gate, gate_pool, others, other_pool) if int8 else None
    order = others.by_content() if too_few is None else []
    choose = min(MOST_TO_CHOOSE, max(LEAST_TO_CHOOSE, len(order) // 4))
    return Parts(
        gate=gate.part(sorted(range(len(gate)), key=lambda i: gate.positions[i]), gate_pool, preprocessing),
        choose=others.part(order[:choose], other_pool, preprocessing),
        calibrate=others.part(order[choose:], other_pool, preprocessing),
        unreadable=len(gate.unreadable) + len(others.unreadable),
        too_few=too_few,
    )


def _too_few_of_two(gate: _Readings, gate_pool: Pool, others: _Readings, other_pool: Pool) -> str | None:
    if (there := len(set(gate.digests))) < LEAST_FOR_GATE:
        return (
            f"int8 needs at least {LEAST_FOR_GATE} different images for its gate, and there are {there} "
            f"{ORIGINS[gate_pool.origin]} that can be read; raise --check-images, or give more with --images"
        )
    if len(others) < LEAST_TO_CALIBRATE + LEAST_TO_CHOOSE:
        return (
            f"int8 needs at least {LEAST_TO_CALIBRATE + LEAST_TO_CHOOSE} different images beside those of its gate "
            f"({LEAST_TO_CALIBRATE} to calibrate, {LEAST_TO_CHOOSE} to choose the way), and there are {len(others)} "
            f"{ORIGINS[other_pool.origin]} that can be read and are not the gate's; give more with "
            "--images"
        )
    return None


def _from_one(pool: Pool, preprocessing: Preprocessing, most_for_gate: int, report: Report) -> Parts:
    read = _read(pool, most_for_gate + MOST_TO_CALIBRATE + MOST_TO_CHOOSE, preprocessing, report)
    order = read.by_content()
    least = LEAST_FOR_GATE + LEAST_TO_CALIBRATE + LEAST_TO_CHOOSE
    choose = min(MOST_TO_CHOOSE, max(LEAST_TO_CHOOSE, len(order) // 8))
    calibrate = min(MOST_TO_CALIBRATE, max(LEAST_TO_CALIBRATE, 3 * len(order) // 8))
    too_few = None
    if len(order) < least:
        too_few = (
            f"int8 needs at least {least} different images, in three parts ({LEAST_FOR_GATE} for its gate, "
            f"{LEAST_TO_CALIBRATE} to calibrate, {LEAST_TO_CHOOSE} to choose the way), and there are {len(order)} "
            f"{ORIGINS[pool.origin]} that can be read; give more with --images"
        )
    elif most_for_gate < LEAST_FOR_GATE:
        too_few = f"int8 needs at least {LEAST_FOR_GATE} images for its gate; raise --check-images"
    if too_few is not None:  # the other precisions have the use of all
        choose = calibrate = 0
    end = choose + calibrate
    return Parts(
        gate=read.part(order[end:][:most_for_gate], pool, preprocessing),
        choose=read.part(order[:choose], pool, preprocessing),
        calibrate=read.part(order[choose:end], pool, preprocessing),
        unreadable=len(read.unreadable),
        too_few=too_few,
    )


def _read(
    pool: Pool,
    most: int,
    preprocessing: Preprocessing,
    report: Report,
    copies: bool = False,
    apart_from: set[bytes] | None = None,
) -> _Readings:
    """Up to `most` images of a pool, prepared. copies: those too that show what another one shows.

    apart_from: digests of what none of them shows. Raises DataError for a gate without images.
    """
    found, known, total = _Readings(), set(apart_from or ()), min(most, len(pool.images))
    for position in _candidates(pool.images, most):
        if len(found) == most:
            break
        try:
            pixels = prepare(pool.images.open(position), preprocessing)
        except UnreadableImage as error:
            found.unreadable.append(str(error))
            continue
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest not in known or copies:
            known.add(digest)
            found.digests.append(digest)
            found.positions.append(position)
            found.pixels.append(pixels)
        report(Progress("images", len(found), total))
    if found.unreadable:
        named = "".join(f"\n  {problem}" for problem in found.unreadable[:MOST_NAMED])
        many = len(found.unreadable)
        report(Notice(f"{many} of the {ORIGINS[pool.origin]} can't be read, left out:{named}"))
    if not len(found) and apart_from is None:
        raise DataError("none of the images for the checks could be read; give others with --images")
    return found


def _candidates(images: ImageSet, most: int) -> Sequence[int]:
    """At least `most` positions where there are so many, and about as many to spare: some may be copies or unreadable.

    They are those whose names have the least digests, so that they are spread over the set in whatever order it is,
    by class for instance.
    """
    if images.rows is not None:  # ranked by such a digest already
        return images.spaced(most)

    def rank(position: int) -> bytes:
        return hashlib.sha256(images.keys[position].encode("utf-8", "surrogatepass")).digest()

    return heapq.nsmallest(2 * most + SPARE, range(len(images)), key=rank)
