"""Feature distillation by angle: the angle between the student's and the teacher's image features."""

from __future__ import annotations

from torch import Tensor


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus the mean cosine similarity of the features of each image, a scalar from 0 to 2.

    student, teacher: (batch, dim), L2-normalised.
    """
    return 1 - (student * teacher).sum(dim=-1).mean()
