"""Feature distillation by angle: the student's image features, turned to the teacher's."""

from __future__ import annotations

from torch import Tensor


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One less the mean cosine of an image's features in two models, a scalar from 0 to 2.

    student, teacher: (batch, dim), L2-normalised.
    """
    return 1 - (student * teacher).sum(dim=-1).mean()
