"""IFAlign: the statistics of the student's image features, drawn to the teacher's."""

from __future__ import annotations

from torch import Tensor

from comkd_cli.errors import BatchTooSmallError
from comkd_cli.runtime import ranks
from comkd_cli.runtime.global_batch import batch_moments


def if_align(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the batch statistics of two sets of image features are from each other.

    student, teacher: (batch, dim), L2-normalised. Returns a scalar: over the dimensions, the summed
    |difference| of the means plus that of the variances, both taken over the batch; the variance is the
    biased one (ComKD-CLIP, arXiv 2408.04145, IFAlign: L_align = L_mean + L_var. The paper writes an L1
    loss without its reduction; the sum is this project's choice). With several processes the batch is that of
    all of them, each giving its part. Raises BatchTooSmallError below two images, which have no variance.
    """
    if len(student) < 2 and ranks.world_size() == 1:
        raise BatchTooSmallError("IFAlign needs at least 2 images in a batch to have a variance")
    (student_mean, student_variance), (teacher_mean, teacher_variance) = batch_moments(student), batch_moments(teacher)
    return (student_mean - teacher_mean).abs().sum() + (student_variance - teacher_variance).abs().sum()
