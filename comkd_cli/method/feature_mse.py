"""Feature distillation by squared error: the distance of the student's image features from the teacher's."""

from __future__ import annotations

from torch import Tensor


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two sets of image features, a scalar.

    student, teacher: (batch, dim), L2-normalised. The mean is over images and dimensions, as in CLIP-KD's code
    (arXiv 2307.12732, FD), so that its weight of 2000 means the same here. Features of unit length make this
    2 / dim times `feature_cosine`.
    """
    return (student - teacher).square().mean()
