"""Supervision by the labels of the training images, with a teacher or without one."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def labels_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the student's class probabilities, the mean over the images, a scalar.

    logits: (batch, classes). labels: (batch,) int64, the index of each image's class.
    """
    return functional.cross_entropy(logits, labels)
