"""Supervision by the labels of those training images that have one, with a teacher or without one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from comkd_cli.recipe.model import UNLABELLED
from comkd_cli.runtime.global_batch import batch_totals


def labels_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the student's class probabilities, the mean over the labelled images, a scalar.

    logits: (batch, classes). labels: (batch,) int64, the index of each image's class, or UNLABELLED. 0 if no image
    has a label. With several processes the mean is over the labelled images of all of them: the result is this
    process's part of it, scaled so that its mean over the processes, weighted by their images, is that mean.
    """
    total = functional.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    images = torch.full((), len(labels), device=labels.device)
    labelled, everywhere = batch_totals(torch.stack([(labels != UNLABELLED).sum(), images]))
    mean: Tensor = total / labelled.clamp(min=1) * (everywhere / images)
    return mean
