"""Image features, computed once for each model and image set and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from comkd_cli.data.loaders import scoring_batches
from comkd_cli.data.source import ImageSet
from comkd_cli.files import sha256_of_data, written_whole
from comkd_cli.predictor import Preprocessing
from comkd_cli.progress import Progress, Report

BATCH_SIZE = 128
STORE_FORMAT = "comkd-features/1"


@dataclass(frozen=True)
class Encoder:
    """What turns images into the features that are kept."""

    identity: str
    """A digest of the weights: other weights, other features."""
    preprocessing: Preprocessing
    encode: Callable[[Tensor], Tensor]
    """From prepared images (batch, 3, size, size) to features (batch, dim)."""


@dataclass(frozen=True)
class Features:
    """The features of every image of a set that could be read."""

    values: np.ndarray
    """float32 (images, dim)."""
    indices: np.ndarray
    """int64 (images,): positions in the set."""
    unreadable: tuple[str, ...]
    """A line for each image that could not be read."""


@dataclass(frozen=True)
class FeatureStore:
    """Where features are kept, and how they are made where they are not there."""

    folder: Path | None
    """None keeps nothing."""
    device: torch.device
    workers: int
    report: Report

    def features(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        """The features of a set, read back if this model, this pre-processing and these images were met before.

        The file's name is a digest of all three, so that what is found can't be another's.
        """
        if self.folder is None:
            return self._compute(encoder, images, label)
        path = self.folder / f"{store_key(encoder, images)}.safetensors"
        kept = _read(path)
        if kept is not None:
            return kept
        made = self._compute(encoder, images, label)
        with written_whole(path) as unfinished:
            save_file(
                {"values": made.values, "indices": made.indices},
                unfinished,
                {"format": STORE_FORMAT, "unreadable": "\n".join(made.unreadable)},
            )
        return made

    @torch.no_grad()
    def _compute(self, encoder: Encoder, images: ImageSet, label: str) -> Features:
        values: list[np.ndarray] = []
        indices: list[np.ndarray] = []
        unreadable: list[str] = []
        done = 0
        for batch in scoring_batches(images, encoder.preprocessing, BATCH_SIZE, self.workers):
            unreadable += [" ".join(problem.split()) for problem in batch.unreadable]
            done += len(batch) + len(batch.unreadable)
            if len(batch):
                encoded = encoder.encode(batch.to(self.device).inputs[0])
                values.append(encoded.float().cpu().numpy())
                indices.append(batch.indices.numpy())
            self.report(Progress(label, done, len(images)))
        return Features(
            np.concatenate(values) if values else np.empty((0, 0), np.float32),
            np.concatenate(indices) if indices else np.empty(0, np.int64),
            tuple(unreadable),
        )


def store_key(encoder: Encoder, images: ImageSet) -> str:
    """A digest of a model's weights, its pre-processing and the files of a set (paths and sizes)."""
    return sha256_of_data(
        [STORE_FORMAT, encoder.identity, asdict(encoder.preprocessing), list(images.keys), list(images.sizes_bytes)]
    )


def _read(path: Path) -> Features | None:
    """Kept features, or None where there are none or the file is damaged: then they are made anew."""
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
