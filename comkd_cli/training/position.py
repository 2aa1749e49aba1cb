"""How far a training run is, with all that its next step depends on beside the model and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from comkd_cli.method.student import learned_state
from comkd_cli.runtime import collectives, ranks


@dataclass
class Position:
    """The next step, the sums of the epoch so far, the figures of finished epochs, and the weights to keep."""

    epoch: int = 0
    step: int = 0
    """Of the epoch; both count from 0."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of the figures of the epoch's steps, by name."""
    probed: dict[str, float] = field(default_factory=dict)
    counted_steps: int = 0
    """Steps in `sums`: those that had images."""
    overflows: Tensor | int = 0
    """Steps of the epoch that the gradient scaler skipped, since their gradients overflowed in fp16; on the device."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The figures of each finished epoch."""
    unreadable: dict[str, None] = field(default_factory=dict)
    """A line for each image that could not be read, in the order in which they were met."""
    best_score: float = -math.inf
    """Of the best epoch so far, if an epoch is selected."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """The weights of the best epoch so far, the weighted sum of the epochs', or the moving average of the steps'; empty
    if the last weights are kept."""

    def add(self, figures: dict[str, Tensor], share: float) -> None:
        """Add a part of a step to the sums, on the device: reading a figure would make the device wait for Python.

        share: the part's share of the step's images, times the number of processes.
        """
        for name, figure in figures.items():
            # MPS has no float64.
            value = figure.detach().double() if figure.device.type != "mps" else figure.detach()
            value = value * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def averages(self) -> dict[str, float]:
        """The averages of the epoch's figures so far."""
        if not self.sums:
            return {}
        totals = torch.stack(list(self.sums.values())).tolist()  # waits for a GPU once, not for each figure
        return {name: total / self.counted_steps for name, total in zip(self.sums, totals, strict=True)}

    def average_over_ranks(self) -> None:
        """Make the sums those of all processes: their average, since each process counts by its share."""
        if ranks.world_size() == 1 or not self.sums:
            return
        values = torch.stack(list(self.sums.values()))
        means = torch.tensor(collectives.all_gather(values.tolist()), dtype=values.dtype).mean(0).to(values.device)
        self.sums = dict(zip(self.sums, means, strict=True))

    def add_to_average(self, model: nn.Module, weight: float) -> None:
        """Add the model's learned tensors to the weighted sum; integers, such as counters, are replaced."""
        for name, value in learned_state(model).items():
            part = value.detach() * weight if value.is_floating_point() else value.detach().clone()
            before = self.kept.get(name)
            self.kept[name] = part if before is None or not value.is_floating_point() else before + part

    def update_ema(self, model: nn.Module, decay: float, step: int) -> None:
        """Move the kept tensors towards the model's after a step; integers, such as counters, are replaced.

        decay: after the first steps; step: of the run, from 0. In step t the decay is min(decay, (1 + t) / (10 + t)),
        as in TensorFlow's and timm's averages, so that the random first weights do not stay in the average.
        """
        state = {name: value.detach() for name, value in learned_state(model).items()}
        if not self.kept:
            self.kept = {name: value.clone() for name, value in state.items()}
            return
        floats = [name for name, value in state.items() if value.is_floating_point()]
        average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
        average([self.kept[name] for name in floats], [state[name] for name in floats], None)
        for name in state.keys() - set(floats):
            self.kept[name] = state[name].clone()

    @contextmanager
    def kept_in(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the kept tensors."""
        own = {name: value.detach().clone() for name, value in learned_state(model).items()}
        model.load_state_dict(self.kept, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)

    def keep_if_best(self, model: nn.Module, score: float) -> None:
        """Keep a copy of the model's learned tensors if the score is the highest so far."""
        if score > self.best_score:
            self.best_score = score
            self.kept = {name: value.detach().clone() for name, value in learned_state(model).items()}

    def next_epoch(self) -> None:
        """Move to the first step of the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.sums, self.probed, self.counted_steps, self.overflows = {}, {}, 0, 0
