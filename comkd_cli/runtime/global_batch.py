"""Statistics of a batch that is divided over processes: of all its images, with gradients to all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, distributed, nn

from comkd_cli.errors import ModelError
from comkd_cli.runtime import ranks


def batch_moments(values: Tensor, axes: Sequence[int] = (0,)) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over these axes of the whole batch, of which each process has a part.

    values: this process's part, which may be smaller than another's. Each of several processes must call it, and
    take part in the backward pass. Gradients are those of the sum of all processes' losses, as data-parallel training
    needs them: it averages over the processes.
    """
    axes = tuple(axes)
    if ranks.world_size() == 1:
        return values.mean(axes), values.var(axes, correction=0)
    mean, variance, _count = _shared_moments(values, axes)
    return mean, variance


def batch_totals(counts: Tensor) -> Tensor:
    """The sums of some counts, int64 (n,), over the processes that share a batch. Each of them must call it."""
    if ranks.world_size() > 1:
        counts = counts.clone()
        distributed.all_reduce(counts)
    return counts


def share_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm of a module, in place, take its statistics from the whole batch of all processes.

    On GPUs by PyTorch's SyncBatchNorm, which refuses CPU tensors; therefore the classes below. Raises ModelError for
    kinds of BatchNorm that these do not implement.
    """
    if device.type == "cuda":
        convert_sync_batchnorm(module)
        return
    for part in module.modules():
        # Only the class changes: parameters, statistics, names and hooks stay those of the module.
        if type(part) is BatchNormAct2d:
            part.__class__ = _SharedBatchNormAct
        elif type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            part.__class__ = _SharedBatchNorm
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                "several processes on a CPU cannot share the statistics of this layer",
                found=type(part).__name__,
                remedy="use one process",
            )


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm (arXiv 1502.03167) over the batch of all processes, in training."""

    def _check_input_dim(self, _values: Tensor) -> None:
        """All shapes are valid: the mean is over all axes but the second."""

    def forward(self, values: Tensor) -> Tensor:
        return _normalised(self, values) if self.training else super().forward(values)


class _SharedBatchNormAct(BatchNormAct2d):  # type: ignore[misc] # timm has no types
    """timm's BatchNorm followed by an activation."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)  # type: ignore[no-any-return]
        return self.act(self.drop(_normalised(self, values)))  # type: ignore[no-any-return]


def _normalised(norm: nn.modules.batchnorm._BatchNorm, values: Tensor) -> Tensor:
    axes = (0, *range(2, values.ndim))
    mean, variance, count = _shared_moments(values.float(), axes)
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            factor = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), factor)
    shape = (1, -1, *[1] * (values.ndim - 2))
    scaled = (values - mean.view(shape)) * (variance.view(shape) + norm.eps).rsqrt()
    if norm.affine:
        scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    return scaled.to(values.dtype)


def _shared_moments(values: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance, and the number of values that each was taken over, by one exchange.

    The moments of the processes are combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm
    for computing sample variances" (1979): the squares around each part's own mean, and those of the means around the
    common one. E[x^2] - E[x]^2 would lose digits if the mean is large.
    """
    shape = [size for axis, size in enumerate(values.shape) if axis not in axes]
    count = math.prod(values.shape[axis] for axis in axes)
    mean = values.mean(axes, keepdim=True)
    squares = (values - mean).square().sum(axes)
    mine = torch.cat([values.new_full((1,), count), mean.flatten(), squares.flatten()])
    counts, means, squared = _of_processes(mine).tensor_split([1, 1 + mean.numel()], dim=1)
    number = counts.sum()
    common = (counts * means).sum(0) / number
    total = squared.sum(0) + (counts * (means - common).square()).sum(0)
    return common.view(shape), (total / number).view(shape), number


def _of_processes(row: Tensor) -> Tensor:
    """A row of each process, (processes, len(row)), with gradients to all of them; a sum exchanges them."""
    before, after = ranks.rank(), ranks.world_size() - ranks.rank() - 1
    return _summed(torch.cat([row.new_zeros(before, len(row)), row[None], row.new_zeros(after, len(row))]))


class _Sum(torch.autograd.Function):
    """The sum over processes; each process's gradient of the sum reaches the values of all."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(values: Tensor) -> Tensor:
    """A separate Function, because PyTorch's is deprecated in favour of a private one."""
    total: Tensor = _Sum.apply(values)
    return total
