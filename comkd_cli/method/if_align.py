"""IFAlign: matches the batch statistics of the student's image features to the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from comkd_cli.errors import BatchTooSmallError
from comkd_cli.runtime import ranks
from comkd_cli.runtime.global_batch import batch_moments


def if_align(student: Tensor, teacher: Tensor) -> Tensor:
    """L_align = L_mean + L_var, the L1 distance of two sets of features' means and variances, a scalar.

    student, teacher: (batch, dim), L2-normalised. Mean and biased variance are taken over the batch, and the L1
    distances are summed over the dimensions (ComKD-CLIP, arXiv 2408.04145, IFAlign; the paper does not say how its
    L1 loss is reduced, so the sum is this project's choice). With several processes the batch is that of all of
    them. Raises BatchTooSmallError for a single image, which has no variance.
    """
    if len(student) < 2 and ranks.world_size() == 1:
        raise BatchTooSmallError("IFAlign needs at least 2 images in a batch", found=len(student))
    if ranks.world_size() > 1:  # one exchange for both
        mean, variance = batch_moments(torch.cat([student, teacher], dim=1))
        width = student.shape[1]
        return (mean[:width] - mean[width:]).abs().sum() + (variance[:width] - variance[width:]).abs().sum()
    (student_mean, student_variance), (teacher_mean, teacher_variance) = batch_moments(student), batch_moments(teacher)
    return (student_mean - teacher_mean).abs().sum() + (student_variance - teacher_variance).abs().sum()
