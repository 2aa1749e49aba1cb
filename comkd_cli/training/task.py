"""What is trained: the model, what it minimises, the images, and the settings of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from comkd_cli.data.loaders import Batch
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import AdamW, Sgd


@dataclass
class StepResult:
    """The loss of a batch and the figures to report."""

    loss: Tensor
    """Scalar, to be minimised."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to average over the epoch and report."""
    probed: dict[str, float] = field(default_factory=dict)
    """Figures that are too costly for each step, measured if the loss was called with probe=True."""


class Objective(Protocol):
    """What a stage minimises and how it scores its model. A stage derives from it and has its own `loss`."""

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        """The loss of a batch, under autocast.

        model: the task's, in training mode, wrapped if training is data-parallel: the gradients of several
        processes are averaged only if it is called through this wrapper. batch: on the model's device. probe: whether
        to measure `StepResult.probed`; true at the first batch of each epoch.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures at the end of an epoch, such as the score on the test images."""
        return {}

    def flush(self, epoch_ended: bool) -> None:
        """Write out what the steps so far left in memory; all processes call it together.

        Called every FLUSH_EVERY_STEPS steps and before each checkpoint.
        """
        return


class Loader(Protocol):
    """What is trained on, step by step: images, or other inputs that count as such."""

    batch_size: int
    image_count: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch."""
        ...

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """The parts of each step of an epoch from a step on; both count from 0."""
        ...

    def name_of(self, index: int) -> str:
        """The name of one of the inputs, by its index in `Batch.indices`, for messages."""
        ...


@dataclass(frozen=True)
class Task:
    """One model to train: on what, how, and where its checkpoint goes."""

    model: nn.Module
    objective: Objective
    loader: Loader
    optim: Sgd | AdamW
    folder: Path
    """Holds metrics.jsonl, and state/ until the task is finished."""
    identity: Identity
    """All that decides the result; a checkpoint with another one is refused."""
    seed: int
    """Of what the model draws while it trains, such as dropout."""
    label: str
    resume_line: str
    """The command that resumes the run, for the message of an interruption."""
    unreadable_limit_percent: float
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Parameter names whose learning rate is a multiple of the others'."""
    evaluate_every_epochs: int = 0
    """How often `Objective.evaluate` is called; 0: only after the last epoch."""
    held_out: bool = False
    """Whether it scores on images that were held out of the training ones, not on a test split; for messages."""
    select_by: str | None = None
    """One of the figures of `Objective.evaluate`, which is then called at the end of every epoch: the weights of the
    epoch with the highest value are kept (of several, the first); None keeps the last epoch's."""
    average: Sequence[float] | None = None
    """A weight for each epoch, summing to 1: the weighted average of the epochs' weights is kept."""
    ema_decay: float | None = None
    """Of an exponential moving average of the weights over the steps, which is kept instead of the last weights."""
    checkpoint_every_minutes: float = 10.0
    """How often a checkpoint is saved within an epoch."""
    unit: str = "images"
    """What the loader has, for messages."""
    track: Sequence[str] = ()
    """The trackers that get the figures, as in the recipe."""
    track_every_steps: int = 0
    """Between the figures of steps; 0 sends only those of epochs."""
    threads: int | None = None
    """Threads of a CPU that compute the steps, as `runtime.cores.step_threads` returns them."""
    uses_all_parameters: bool = False
    """Whether each step gives every trainable parameter a gradient; data-parallel training then need not search for
    those without."""

    def kept_figures(self, history: Sequence[dict[str, float]]) -> dict[str, float]:
        """The figures of the epoch whose weights are kept. history: the figures of each epoch."""
        key = self.select_by
        # max returns the first of several, as the selection of the weights does.
        return history[-1] if key is None else max(history, key=lambda line: line[key])
