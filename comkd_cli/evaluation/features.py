"""Image features, computed once for each model and image set and stored on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from comkd_cli.data.loaders import scoring_batches
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import ComkdError, ModelError, TrainingError
from comkd_cli.events import Notice, Progress, Report
from comkd_cli.files import atomic_write, sha256_of_data
from comkd_cli.runtime import collectives, ranks

BATCH_SIZE = 64  # on CPUs the activations of larger batches of 224 pixels fall out of the caches
STORE_FORMAT = "comkd-features/2"


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
    """None stores nothing."""
    device: torch.device
    workers: int
    report: Report

    def features(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        """The features of a set, from the folder if they were computed before.

        label: names the work in progress events. The file's name is a digest of the model, the pre-processing and the
        images, so that stored features cannot be those of others. Several processes divide the images among them, and
        each returns all features. Raises ModelError where some are NaN or infinite: the predicted class of such an
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
        if self.folder is None:
            return self._compute(encoder, images, label)
        with collectives.without_timeout():  # it reads the images whose digests are not cached
            path = self.folder / f"{store_key(encoder, images)}.safetensors"
        kept = _read(path)
        if len({row[0] for row in collectives.all_gather_ints([-1 if kept is None else len(kept.indices)])}) > 1:
            kept = None  # in all processes, since they compute together
        if kept is not None and len(kept.indices) == len(images):
            return kept
        made = self._compute(encoder, images, label) if kept is None else self._completed(kept, encoder, images, label)
        if made is kept:
            return kept
        with collectives.without_timeout():  # disks can be slow
            if ranks.is_main():
                self._write(path, made)
        return made

    def _write(self, path: Path, made: Features) -> None:
        """Write features. A failure is a notice: the next evaluation takes longer, and no score is lost."""
        # Names that are not UTF-8 reach Python as lone surrogates, which the file's metadata cannot hold.
        unreadable = "\n".join(made.unreadable).encode("utf-8", "backslashreplace").decode("utf-8")
        try:
            with atomic_write(path) as unfinished:
                save_file(
                    {"values": made.values, "indices": made.indices},
                    unfinished,
                    {"format": STORE_FORMAT, "unreadable": unreadable},
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
        if ranks.world_size() == 1:
            return self._compute_alone(encoder, images, label)
        mine = np.asarray(ranks.share(range(len(images))))
        found = self._compute_alone(encoder, images.subset(mine.tolist()), label)
        everywhere = collectives.all_gather((store_key(encoder, images), replace(found, indices=mine[found.indices])))
        if len({key for key, _ in everywhere}) > 1:
            raise TrainingError(
                f"{label}: the processes read different images or models", remedy="give all of them the same files"
            )
        parts = [part for _, part in everywhere]
        filled = [part.values for part in parts if len(part.indices)]
        indices = np.concatenate([part.indices for part in parts])
        order = np.argsort(indices)
        values = np.concatenate(filled)[order] if filled else found.values
        return Features(values, indices[order], tuple(problem for part in parts for problem in part.unreadable))

    @torch.inference_mode()
    def _compute_alone(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        values = np.empty((0, 0), np.float32)
        indices = np.empty(len(images), np.int64)
        unreadable: list[str] = []
        done = read = 0
        for batch in scoring_batches(images, encoder.preprocessing, BATCH_SIZE, self.workers):
            unreadable += [" ".join(problem.split()) for problem in batch.unreadable]
            done += len(batch) + len(batch.unreadable)
            if len(batch):
                encoded = encoder.encode(batch.to(self.device).inputs[0]).float().cpu().numpy()
                if not read:  # in one piece: joining parts at the end would take the memory twice
                    values = np.empty((len(images), encoded.shape[1]), np.float32)
                values[read : read + len(batch)] = encoded
                indices[read : read + len(batch)] = batch.indices.numpy()
                read += len(batch)
            self.report(Progress(label, done, len(images)))
        return Features(values[:read], indices[:read], tuple(unreadable))


def store_key(encoder: Encoder, images: ImageSet) -> str:
    """A digest of a model's weights, its pre-processing, and the names and contents of a set's images, in order."""
    return sha256_of_data([STORE_FORMAT, encoder.identity, asdict(encoder.preprocessing), images.ordered_digest])


def _read(path: Path) -> Features | None:
    """Stored features; None where there are none or the file is damaged, and they have to be computed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != STORE_FORMAT:
                return None
            lines = metadata["unreadable"].splitlines()
            return Features(opened.get_tensor("values"), opened.get_tensor("indices"), tuple(lines))
    except (SafetensorError, OSError, KeyError):
        return None
