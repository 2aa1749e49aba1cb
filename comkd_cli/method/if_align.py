"""IFAlign: matches the batch statistics of the student's image features to the teacher's."""

from __future__ import annotations

from torch import Tensor

from comkd_cli.errors import BatchTooSmallError
from comkd_cli.runtime import ranks
from comkd_cli.runtime.global_batch import batch_moments


def if_align(student: Tensor, teacher: Tensor) -> Tensor:
    """L_align = L_mean + L_var, the L1 distance of two sets of features' means and variances, a scalar.

    student, teacher: (batch, dim), L2-normalised. Mean and biased variance are taken over the batch, and the L1
    distances are summed over the dimensions (ComKD-CLIP, arXiv 2408.04145, IFAlign; the paper does not say how its
    L1 loss is reduced, so the sum is this project's choice). With several processes the batch is that of all of
    them. Raises BatchTooSmallError for one image alone, which has no variance.
    """
    if len(student) < 2 and ranks.world_size() == 1:
        raise BatchTooSmallError("IFAlign needs at least 2 images in a batch", found=len(student))
    (student_mean, student_variance), (teacher_mean, teacher_variance) = batch_moments(student), batch_moments(teacher)
    return (student_mean - teacher_mean).abs().sum() + (student_variance - teacher_variance).abs().sum()
