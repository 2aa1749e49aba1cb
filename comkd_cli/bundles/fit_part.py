"""The images that temperature and threshold are fitted on: a part of the gate's pool that the gate does not see.

A student is more confident on its training images than on others. Images of its own data are used only if it was not
trained on them; of a folder that the user gives, this is assumed and not checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from comkd_cli.bundles.parts import LEAST_FOR_GATE, Part, Parts, Pool, read_parts
from comkd_cli.data.folder import images_below
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report

# The 95 % interval of an acceptance of 95 % is 85 to 98 % from 50 images, and 93 to 97 % from 512.
LEAST_TO_FIT, MOST_TO_FIT = 50, 512
MOST_NEGATIVE = 512
NOT_TRAINED_ON = "temperature and threshold assume that the student was not trained on the images of --images"


def with_fit_part(parts: Parts, most_for_gate: int) -> Parts:
    """The parts with the gate's images divided in two; copies of an image are on one side.

    parts: whose gate holds up to `most_for_gate` + MOST_TO_FIT images. The division depends on contents alone. Half of
    the different images go to the fit, or more if the gate does not need them; with fewer than LEAST_TO_FIT all stay
    with the gate.
    """
    gate = parts.gate
    digests = _digests(gate)
    different = sorted(set(digests))
    count = min(MOST_TO_FIT, max(len(different) // 2, len(different) - most_for_gate))
    fit = set(different[:count]) if count >= LEAST_TO_FIT else set()
    by_content = sorted((i for i, digest in enumerate(digests) if digest not in fit), key=lambda i: (digests[i], i))
    parts = _with_gate(parts, _selected(gate, digests, sorted(by_content[:most_for_gate])))
    if not fit:
        return replace(
            parts,
            no_fit=f"at least {2 * LEAST_TO_FIT} different images that the student was not trained on are needed, half "
            f"of them for the gate, but only {len(different)} could be read",
        )
    return replace(parts, fit=_selected(gate, digests, [i for i, digest in enumerate(digests) if digest in fit]))


def _with_gate(parts: Parts, gate: Part) -> Parts:
    """The parts with a smaller gate, which may be too small for int8."""
    if not len(parts.calibrate.images) or gate.different >= LEAST_FOR_GATE:
        return replace(parts, gate=gate)
    return replace(
        parts,
        gate=gate,
        choose=_selected(parts.choose, [], []),
        calibrate=_selected(parts.calibrate, [], []),
        too_few=f"int8 needs at least {LEAST_FOR_GATE} different images for its gate, but it has {gate.different}; "
        "raise --check-images",
    )


def read_negatives(folder: Path, parts: Parts, preprocessing: Preprocessing, report: Report) -> Part:
    """Up to MOST_NEGATIVE images below a folder, which show none of the classes.

    Images that are also among those of the gate or the fit are left out. Raises DataError without any.
    """
    pool = Pool(images_below(folder, report), "negative")
    none = DataError("none of its images could be read", path=folder, remedy="choose other images with --negatives")
    if not len(pool.images):
        raise none
    try:
        part = read_parts(pool, pool, preprocessing, MOST_NEGATIVE, False, report).gate
    except DataError as error:
        raise none from error
    own = {digest for images in (parts.gate, parts.fit) if images is not None for digest in _digests(images)}
    digests = _digests(part)
    others = [i for i, digest in enumerate(digests) if digest not in own]
    if not others:
        raise DataError(
            "contains only images that the bundle is fitted to or checked on",
            path=folder,
            remedy="choose other images with --negatives",
        )
    if shared := len(digests) - len(others):
        report(
            Notice(
                f"{folder}: {shared} of {len(digests)} images are skipped, because the bundle is fitted to them or "
                "checked on them"
            )
        )
    return _selected(part, digests, others)


def _digests(part: Part) -> list[bytes]:
    return [hashlib.sha256(image.tobytes()).digest() for image in part.images]


def _selected(part: Part, digests: Sequence[bytes], positions: list[int]) -> Part:
    """Some of the images of a part. digests: of all of its images."""
    return replace(
        part,
        images=part.images[positions],
        labels=None if part.labels is None else np.asarray(part.labels)[positions],
        different=len({digests[i] for i in positions}),
        pictures=None if part.pictures is None else part.pictures.subset(positions),
    )
