"""Image features, computed once for each model and image set and stored on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from comkd_cli.data.loaders import shared_scoring_batches
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import ComkdError, ModelError, TrainingError
from comkd_cli.events import Notice, Progress, Report
from comkd_cli.files import atomic_write, sha256_of_data
from comkd_cli.runtime import collectives, ranks

BATCH_SIZE = 64  # on CPUs the activations of larger batches of 224 pixels fall out of the caches
STORE_FORMAT = "comkd-features/2"
METADATA = "comkd"


@dataclass(frozen=True)
class Encoder:
    """Turns images into the features that are stored."""

    identity: str
    """A digest of the weights."""
    preprocessing: Preprocessing
    encode: Callable[[Tensor], Tensor]
    """From prepared images (batch, 3, size, size) to features (batch, dim)."""


@dataclass(frozen=True)
class Features:
    """The features of every readable image of a set."""

    values: np.ndarray
    """float32 (images, dim)."""
    indices: np.ndarray
    """int64 (images,): of the images in the set."""
    unreadable: tuple[str, ...]
    """A line for each image that could not be read."""


@dataclass(frozen=True)
class FeatureStore:
    """Stores features, and computes those that it lacks."""

    folder: Path | None
    """None: nothing is stored."""
    device: torch.device
    workers: int
    report: Report
    companions: tuple[Encoder, ...] = ()
    """Models that will encode the same images: each image is decoded once for all."""
    _ready: dict[str, Features] = field(default_factory=dict)
    """Features of companions, by their file's name, until they are needed."""

    def features(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        """The features of a set, from the folder if they were computed before.

        label: names the work in progress events. The file's name is a digest of the model, the pre-processing and the
        images, so that stored features cannot be those of others. Several processes divide the images among them, and
        each returns all features. Raises ModelError if some are NaN or infinite: the predicted class of such an
        image would be the first, whatever it shows.
        """
        found = self._features(encoder, images, label)
        if count := int((~np.isfinite(found.values).all(axis=1)).sum()):
            raise ModelError(
                f"{label}: the model's features of {count} of {len(found.indices)} images are NaN or infinite: its "
                "weights are damaged, or its training diverged",
                remedy="use other weights",
            )
        return found

    def _features(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        if self.folder is None and not self.companions:
            return self._compute(encoder, images, label)
        with collectives.without_timeout():  # it reads the images whose digests are not cached
            key = store_key(encoder, images)
        if key in self._ready:
            return self._ready.pop(key)
        kept = self._kept(key)
        if kept is not None and len(kept.indices) == len(images):
            return kept
        if kept is None:
            return self._computed_with_companions(encoder, images, label)
        made = self._completed(kept, encoder, images, label)
        if made is not kept:
            self._store(key, made)
        return made

    def _kept(self, key: str) -> Features | None:
        """Stored features; None in all processes if one lacks them, since they compute together."""
        kept = None if self.folder is None else _read(self.folder / f"{key}.safetensors")
        found = collectives.all_gather_ints([-1 if kept is None else len(kept.indices)])
        return kept if len({row[0] for row in found}) == 1 else None

    def _computed_with_companions(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        """Features that are not stored, and from the same pass over the images those that companions lack."""
        lacking = {store_key(encoder, images): encoder}
        for companion in self.companions:
            key = store_key(companion, images)
            if key not in lacking and key not in self._ready and self._kept(key) is None:
                lacking[key] = companion
        found = self._compute_together(list(lacking.values()), images, label)
        for key, made in zip(lacking, found, strict=True):
            if made is not None:
                self._store(key, made)
                self._ready[key] = made
        return self._ready.pop(next(iter(lacking)))

    def _store(self, key: str, made: Features) -> None:
        with collectives.without_timeout():  # disks can be slow
            if self.folder is not None and ranks.is_main():
                self._write(self.folder / f"{key}.safetensors", made)

    def _write(self, path: Path, made: Features) -> None:
        """Write features. A failure is a notice: the next evaluation takes longer, and no score is lost."""
        # Names that are not UTF-8 reach Python as lone surrogates, which the file's metadata cannot hold.
        unreadable = "\n".join(made.unreadable).encode("utf-8", "backslashreplace").decode("utf-8")
        try:
            with atomic_write(path) as unfinished:
                save_file(
                    {"values": made.values, "indices": made.indices},
                    unfinished,
                    # One entry: safetensors writes several in an order that differs from process to process.
                    {METADATA: json.dumps({"format": STORE_FORMAT, "unreadable": unreadable})},
                )
        except (ComkdError, OSError, SafetensorError) as error:
            cause = error.__cause__ or error
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
            self.report(
                Notice(f"features could not be stored in {path.parent}: {reason}; the next evaluation recomputes them")
            )

    def _completed(self, kept: Features, encoder: Encoder, images: ImageSet, label: str) -> Features:
        """Stored features, with those of images that could not be read before and can be read now."""
        absent = sorted(set(range(len(images))) - set(kept.indices.tolist()))
        found = self._compute(encoder, images.subset(absent), label)
        if not len(found.indices):
            return kept
        indices = np.concatenate([kept.indices, np.asarray(absent)[found.indices]])
        values = np.concatenate([kept.values.reshape(-1, found.values.shape[1]), found.values])
        order = np.argsort(indices)
        return Features(values[order], indices[order], found.unreadable)

    def _compute(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        (found,) = self._compute_together([encoder], images, label)
        assert found is not None
        return found

    def _compute_together(self, encoders: Sequence[Encoder], images: ImageSet, label: str) -> list[Features | None]:
        """The features of each model; None for a model that failed, but for the first, whose error is raised."""
        if ranks.world_size() == 1:
            return self._compute_alone(encoders, images, label)
        mine = np.asarray(ranks.share(range(len(images))))
        found = self._compute_alone(encoders, images.subset(mine.tolist()), label)
        placed = [None if part is None else replace(part, indices=mine[part.indices]) for part in found]
        keys = [store_key(encoder, images) for encoder in encoders]
        everywhere = collectives.all_gather((keys, placed))
        if any(others != keys for others, _ in everywhere):
            raise TrainingError(
                f"{label}: the processes read different images or models",
                remedy="make the same files available to all of them",
            )
        return [_joined([parts[position] for _, parts in everywhere]) for position in range(len(encoders))]

    @torch.inference_mode()
    def _compute_alone(self, encoders: Sequence[Encoder], images: ImageSet, label: str) -> list[Features | None]:
        collected: list[_Collected | None] = [_Collected(len(images)) for _ in encoders]
        indices = np.empty(len(images), np.int64)
        unreadable: list[str] = []
        done = read = 0
        preprocessings = [encoder.preprocessing for encoder in encoders]
        for batch in shared_scoring_batches(images, preprocessings, BATCH_SIZE, self.workers):
            unreadable += [" ".join(problem.split()) for problem in batch.unreadable]
            done += len(batch) + len(batch.unreadable)
            if len(batch):
                inputs = batch.to(self.device).inputs
                for position, (encoder, rows) in enumerate(zip(encoders, collected, strict=True)):
                    if rows is not None and not rows.add(encoder, inputs[position], may_fail=position > 0):
                        collected[position] = None
                indices[read : read + len(batch)] = batch.indices.numpy()
                read += len(batch)
            self.report(Progress(label, done, len(images)))
        return [
            None if rows is None else Features(rows.values[:read], indices[:read], tuple(unreadable))
            for rows in collected
        ]


class _Collected:
    """The features of one model, batch by batch."""

    def __init__(self, images: int) -> None:
        self.values = np.empty((0, 0), np.float32)
        self._images, self._read = images, 0

    def add(self, encoder: Encoder, inputs: Tensor, may_fail: bool) -> bool:
        """Encode a batch. Returns whether that succeeded; a model that may not fail raises its error instead."""
        try:
            encoded = encoder.encode(inputs).float().cpu().numpy()
        except (RuntimeError, MemoryError):
            if not may_fail:
                raise
            return False
        if not self._read:  # in one piece: joining parts at the end would take the memory twice
            self.values = np.empty((self._images, encoded.shape[1]), np.float32)
        self.values[self._read : self._read + len(encoded)] = encoded
        self._read += len(encoded)
        return True


def _joined(parts: Sequence[Features | None]) -> Features | None:
    """The features of all processes, in the order of the set; None if the model failed in one of them."""
    complete = [part for part in parts if part is not None]
    if len(complete) < len(parts):
        return None
    filled = [part.values for part in complete if len(part.indices)]
    indices = np.concatenate([part.indices for part in complete])
    order = np.argsort(indices)
    values = np.concatenate(filled)[order] if filled else complete[0].values
    return Features(values, indices[order], tuple(problem for part in complete for problem in part.unreadable))


def store_key(encoder: Encoder, images: ImageSet) -> str:
    """A digest of a model's weights, its pre-processing, and the names and contents of a set's images, in order."""
    return sha256_of_data([STORE_FORMAT, encoder.identity, asdict(encoder.preprocessing), images.ordered_digest])


def _read(path: Path) -> Features | None:
    """Stored features; None if there are none or the file is damaged, and they have to be computed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as opened:
            stored = opened.metadata() or {}
            metadata = json.loads(stored[METADATA]) if METADATA in stored else stored  # as earlier versions wrote it
            if metadata.get("format") != STORE_FORMAT:
                return None
            lines = metadata["unreadable"].splitlines()
            return Features(opened.get_tensor("values"), opened.get_tensor("indices"), tuple(lines))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
