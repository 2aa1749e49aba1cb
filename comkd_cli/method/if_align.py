"""IFAlign: the statistics of the student's image features, drawn to the teacher's."""

from __future__ import annotations

from torch import Tensor

from comkd_cli.errors import BatchTooSmallError


def if_align(student: Tensor, teacher: Tensor) -> Tensor:
    """How far the batch statistics of two sets of image features are from each other.

    student, teacher: (batch, dim), L2-normalised. Returns a scalar: over the dimensions, the summed
    |difference| of the means plus that of the variances, both taken over the batch; the variance is the
    biased one (ComKD-CLIP, arXiv 2408.04145, IFAlign: L_align = L_mean + L_var. The paper writes an L1
    loss without its reduction; the sum is this project's choice). Raises BatchTooSmallError below two
    images, which have no variance.
    """
    if len(student) < 2:
        raise BatchTooSmallError("IFAlign needs at least 2 images in a batch to have a variance")
    mean_gap = (student.mean(0) - teacher.mean(0)).abs().sum()
    variance_gap = (student.var(0, correction=0) - teacher.var(0, correction=0)).abs().sum()
    return mean_gap + variance_gap
