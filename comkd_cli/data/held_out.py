"""Divides the training images of a source without a test split into those to train on and those to measure on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from comkd_cli.data.contents import FileContents, Fingerprint
from comkd_cli.data.holdout import DIGEST_BYTES, Holdout, name_and_size_digest, stratified
from comkd_cli.data.shard_division import divide_index
from comkd_cli.data.shards import ShardImages, shard_images
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report

FEW = 30  # held-out images: of fewer, the 95 % interval of a share is up to 18 points wide on either side
FIELD = "data.holdout_percent"


def hold_out(source: Source, percent: float, fingerprint: Fingerprint, report: Report) -> Source:
    """The source with a share of its training images as test images.

    Unchanged, with a notice, if none would be held out. Raises DataError if fewer than two would be left to train
    on.
    """
    digests = _digests(source.train, fingerprint)
    holdout = stratified(percent, fingerprint, digests, source.train.labels)
    divided = _divided(source, holdout, digests)
    if divided is None:
        report(
            Notice(
                f"{source.name}: none of {len(source.train):,} images is held out ({FIELD} is {percent:g}), so "
                f"agreement and gates will be measured on training images; raise {FIELD}, or add a test split"
            )
        )
        return source
    assert divided.test is not None  # of every divided source
    if len(divided.train) < 2:
        raise DataError(
            f"leaves {len(divided.train)} of {len(source.train)} images to train on, fewer than 2",
            path=source.name,
            field=FIELD,
            found=f"{percent:g}",
            remedy="lower it, set it to 0, or add images",
        )
    _report_division(source, divided, report)
    return divided


def hold_out_again(source: Source, holdout: Holdout) -> Source:
    """The source divided as when a student was trained, whatever images were added or removed since.

    Unchanged if none of its images is held out.
    """
    return _divided(source, holdout, _digests(source.train, holdout.fingerprint)) or source


def without_images_of(images: ImageSet, others: ImageSet, fingerprint: Fingerprint) -> ImageSet:
    """The images of a set whose content is not in another one."""
    known = set(_digests(others, fingerprint))
    return images.subset([i for i, digest in enumerate(_digests(images, fingerprint)) if digest not in known])


def count_shared(images: ImageSet, others: ImageSet) -> int:
    """The number of images whose content is also in another set."""
    known = set(_digests(others, "contents"))
    return sum(digest in known for digest in _digests(images, "contents"))


def _divided(source: Source, holdout: Holdout, digests: Sequence[bytes]) -> Source | None:
    """The divided source; None if nothing is held out."""
    train = source.train
    if isinstance(train, ShardImages):
        parts = divide_index(train.index, holdout)
        if parts is None:
            return None
        return replace(source, train=shard_images(parts[0]), test=shard_images(parts[1]), holdout=holdout)
    held = [holdout.holds_out(digest) for digest in digests]
    if not any(held):
        return None
    return replace(
        source,
        train=train.subset([index for index, is_held in enumerate(held) if not is_held]),
        test=_scorable(train.subset([index for index, is_held in enumerate(held) if is_held])),
        holdout=holdout,
    )


def _scorable(held: ImageSet) -> ImageSet:
    """Of partly labelled held-out images: the labelled ones if they suffice for a score, otherwise all without labels.

    So a reported score covers the whole returned set; without labels, only the agreement is measured.
    """
    if held.labels is None or held.labelled_count == len(held):
        return held
    return held.labelled if held.labelled_count >= FEW else replace(held, labels=None)


def _digests(images: ImageSet, fingerprint: Fingerprint) -> list[bytes]:
    """What each image is compared by, 16 bytes; empty for shards, whose index holds it."""
    if isinstance(images, ShardImages):
        return []
    if fingerprint == "size_and_time" and isinstance(images.contents, FileContents):
        pairs = zip(images.keys, images.contents.sizes(images.keys), strict=True)
        return [name_and_size_digest(key, size) for key, size in pairs]
    return [digest[:DIGEST_BYTES] for digest in images.content_digests()]


def _report_division(whole: Source, source: Source, report: Report) -> None:
    """Report how many images are held out, by what, and whether they are few."""
    assert source.test is not None
    assert source.holdout is not None
    total, left, held = len(whole.train), len(source.train), len(source.test)
    text = (
        f"{source.name}: {total - left:,} of {total:,} images are held out for evaluation, and {left:,} are used for "
        "training"
    )
    if held < total - left:
        text += f"; the {held:,} of them that have labels are scored"
    elif source.test.labels is None and whole.train.labelled_count:
        text += f"; fewer than {FEW} of them have labels, so no accuracy is measured, but the agreement on all of them"
    if source.holdout.fingerprint == "size_and_time":
        text += (
            "; they are chosen by file name and size, since data.fingerprint reads no file: copies with other names "
            "can be on both sides"
        )
    if held < FEW:
        text += (
            f"; a share of {held} images has a wide interval, up to {98 / math.sqrt(held):.0f} points on either side: "
            f"raise {FIELD}, or add a test split"
        )
    report(Notice(text))
