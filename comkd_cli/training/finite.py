"""Losses, gradients and weights that are NaN or infinite: found without making a GPU wait at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comkd_cli.data.loaders import Batch
from comkd_cli.errors import TrainingError
from comkd_cli.method.student import learned_state
from comkd_cli.runtime import collectives
from comkd_cli.training.position import Position
from comkd_cli.training.task import Task

MOST_IMAGES = 8
"""Named in an error."""
REMEDY = (
    "lower the learning rate, set clip_gradient_norm, or use precision fp32 or bf16, then rerun with --fresh to train "
    "from scratch; the last checkpoint is kept until then"
)


@dataclass(frozen=True)
class _Step:
    """What one process computed in a step or in a part of it."""

    epoch: int
    step: int
    indices: Tensor
    """Of the images, on the CPU."""
    names: tuple[str, ...]
    values: Tensor
    """Of each name, (names,), on the device."""


@dataclass(frozen=True)
class _Fault:
    """The first step that went wrong on one process."""

    epoch: int
    step: int
    names: tuple[str, ...]
    found: float
    images: tuple[str, ...]


class NumberWatch:
    """Keeps the figures of the last steps on the device until `check` reads them all at once."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._steps: list[_Step] = []

    def add(self, position: Position, parts: Iterable[Batch], figures: Mapping[str, Tensor]) -> None:
        """Keep scalars of the step at a position, which was made with these parts of a batch."""
        values = torch.stack([figure.detach().float().reshape(()) for figure in figures.values()])
        indices = torch.cat([part.indices for part in parts])
        self._steps.append(_Step(position.epoch, position.step, indices, tuple(figures), values))

    def check(self) -> None:
        """Raise TrainingError for the first step that was added since the last check and has a figure that is not
        finite, with its images. All processes call it together; it waits for the device.
        """
        faults = [fault for fault in collectives.all_gather(self._first_fault()) if fault is not None]
        self._steps.clear()
        if not faults:
            return
        first = min(faults, key=lambda fault: (fault.epoch, fault.step))
        same = [fault for fault in faults if (fault.epoch, fault.step) == (first.epoch, first.step)]
        images = [name for fault in same for name in fault.images]
        shown = ", ".join(images[:MOST_IMAGES])
        more = f" and {len(images) - MOST_IMAGES} more" if len(images) > MOST_IMAGES else ""
        names = dict.fromkeys(name for fault in same for name in fault.names)
        raise TrainingError(
            f"{self._task.label}: {', '.join(names)} not finite in epoch {first.epoch + 1}, step {first.step + 1}, on "
            f"the {self._task.unit} {shown}{more}",
            found=first.found,
            remedy=REMEDY,
        )

    def _first_fault(self) -> _Fault | None:
        if not self._steps:
            return None
        rows = iter(torch.cat([step.values for step in self._steps]).cpu().isfinite().tolist())
        for step in self._steps:
            finite = [next(rows) for _ in step.names]
            if not all(finite):
                names = tuple(name for name, is_finite in zip(step.names, finite, strict=True) if not is_finite)
                found = float(step.values[finite.index(False)])
                images = tuple(map(self._task.loader.name_of, step.indices.tolist()))
                return _Fault(step.epoch, step.step, names, found, images)
        return None


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of some tensors, a scalar on their device; NaN if one holds NaN."""
    return nn.utils.get_total_norm(tensors, norm_type=float("inf"))


def check_weights(task: Task) -> None:
    """Raise TrainingError if a learned tensor is not finite, before a checkpoint with it replaces a good one."""
    weights = [value.detach() for value in learned_state(task.model).values() if value.is_floating_point()]
    found = float(largest(weights))
    if not math.isfinite(found):
        raise TrainingError(f"{task.label}: a weight is not finite", found=found, remedy=REMEDY)
