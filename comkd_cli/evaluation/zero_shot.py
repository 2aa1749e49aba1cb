"""Zero-shot classification of a whole image set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comkd_cli.data.loaders import scoring_batches
from comkd_cli.data.source import ImageSet
from comkd_cli.predictor import Preprocessing
from comkd_cli.progress import Progress, Report

BATCH_SIZE = 128


@dataclass(frozen=True)
class Answers:
    """A model's answer to every image of a set that could be read."""

    predicted: np.ndarray
    """(images,) class indices."""
    indices: np.ndarray
    """(images,) positions in the set."""
    labels: np.ndarray | None
    """(images,) class indices, or None where the set is unlabelled."""
    unreadable: tuple[str, ...]
    """A line for each image that could not be read."""


@torch.no_grad()
def answer(
    logits_of: Callable[[Tensor], Tensor],
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    workers: int,
    report: Report,
    label: str,
    batch_size: int = BATCH_SIZE,
) -> Answers:
    """Classify every image of a set once, in order.

    logits_of: from a batch of inputs on the device to logits (batch, classes).
    """
    predicted: list[np.ndarray] = []
    indices: list[np.ndarray] = []
    unreadable: list[str] = []
    done = 0
    for batch in scoring_batches(images, preprocessing, batch_size, workers):
        unreadable += batch.unreadable
        done += len(batch) + len(batch.unreadable)
        if len(batch):
            logits = logits_of(batch.inputs[0].to(device, non_blocking=True))
            predicted.append(logits.argmax(dim=1).cpu().numpy())
            indices.append(batch.indices.numpy())
        report(Progress(label, done, len(images)))
    positions = np.concatenate(indices) if indices else np.empty(0, dtype=np.int64)
    return Answers(
        predicted=np.concatenate(predicted) if predicted else np.empty(0, dtype=np.int64),
        indices=positions,
        labels=None if images.labels is None else np.asarray(images.labels)[positions],
        unreadable=tuple(unreadable),
    )
