"""The training loop that both stages share: steps, epochs, saved state, and going on from it exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from comkd_cli.allocator import keep_freed_memory
from comkd_cli.checkpoints import save_plain
from comkd_cli.data.loaders import Batch, TrainingLoader
from comkd_cli.devices import failures_explained
from comkd_cli.errors import CheckpointError, DataError, Interrupted, TrainingError
from comkd_cli.files import remove_folder, write_text
from comkd_cli.interrupts import stop_wishes
from comkd_cli.progress import Epoch, Notice, Progress, Report
from comkd_cli.recipe.model import AdamW, Sgd
from comkd_cli.schedule import learning_rate

STATE_FORMAT = "comkd-state/2"
REPORT_EVERY_SECONDS = 0.5
MOST_NAMED = 10  # unreadable images that are named one by one; all are counted


@dataclass
class StepResult:
    """What a loss function makes of a batch."""

    loss: Tensor
    """Scalar, to be minimised."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to average over the epoch and report."""
    probed: dict[str, float] = field(default_factory=dict)
    """Costlier figures, measured where a probe was asked for."""


@dataclass(frozen=True)
class Task:
    """One thing to train: what, on what, how, and where its state is kept."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch, bool], StepResult]
    """Of the model, in training mode and on its device, a batch there, and whether to probe, which is
    asked for at the first batch of each epoch."""
    loader: TrainingLoader
    optim: Sgd | AdamW
    folder: Path
    """Holds metrics.jsonl, and state/ until the task is finished."""
    identity: str
    """A digest of all that decides the result; a state with another one is refused."""
    seed: int
    """Of what the model draws while it trains, such as dropout."""
    label: str
    resume_line: str
    """The command that goes on, for the message of an interruption."""
    unreadable_limit_percent: float
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Parameter names whose learning rate is a multiple of the others'."""
    evaluate: Callable[[], dict[str, float]] | None = None
    """Figures at the end of an epoch."""
    evaluate_every_epochs: int = 0
    select: Callable[[], float] | None = None
    """A score at the end of an epoch; the weights of the best epoch are kept, not the last's."""
    average: Sequence[float] | None = None
    """A weight for each epoch, summing to 1: what is kept is the average of the epochs' weights."""

    @property
    def state_file(self) -> Path:
        """Where the state is kept between steps."""
        return _state_file(self.folder)


@dataclass
class _Position:
    """How far a task is, with all that the next step depends on beside the model and optimiser."""

    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    probed: dict[str, float] = field(default_factory=dict)
    counted_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    unreadable: dict[str, None] = field(default_factory=dict)
    best_score: float = -math.inf
    """With `select`: of the best epoch so far."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """With `select` the tensors of the best epoch so far, with `average` their weighted sum."""
    reported_at: float = 0.0


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's view of the machine: device, autocast, gradient scaling. Raises TrainingError."""
    try:
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"precision: {precision} does not work on this machine: {error}") from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in fp32 and not say so.
        raise TrainingError("precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if accelerator.num_processes > 1:
        raise TrainingError("comkd trains in one process; start it without `accelerate launch` or torchrun")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def fit(task: Task, accelerator: Accelerator, report: Report) -> list[dict[str, float]]:
    """Train to the last epoch, going on from a saved state where there is one.

    The state is saved at every epoch's end and when a stop is asked for; what comes out does not depend
    on how often that happened. Returns the figures of every epoch. Raises Interrupted, TrainingError,
    DataError (too many unreadable images) or CheckpointError (a state of something else).
    """
    optimizer = accelerator.prepare(make_optimizer(task.model, task.optim, task.rate_factors))
    model = accelerator.prepare(task.model)
    position = _load_state(task, optimizer, accelerator)
    if position is None:
        position = _Position()
        torch.manual_seed(task.seed)
    elif position.epoch < task.optim.epochs:
        report(Notice(f"going on from epoch {position.epoch + 1}, step {position.step + 1}"))
    with stop_wishes() as wish, failures_explained():
        while position.epoch < task.optim.epochs:
            try:
                _run_epoch(task, model, optimizer, accelerator, position, wish, report)
            except RuntimeError as error:
                # A scheduler's SIGTERM reaches the workers too. Their death may be met in the middle of a
                # step, so what is gone on with is the state of the last epoch's end.
                if (code := wish()) is None:
                    raise
                message = f"stopped; the last finished epoch is saved. To go on:\n  {task.resume_line}"
                raise Interrupted(message, code) from error
            _save_state(task, optimizer, accelerator, position)
            if (code := wish()) is not None:
                raise Interrupted(_stopped_message(task, position), code)
    if position.kept:
        task.model.load_state_dict(position.kept, strict=False)
    if position.unreadable:
        count = len(position.unreadable)
        report(Notice(f"{count} of {task.loader.image_count} images could not be read and were left out"))
    accelerator.free_memory()  # it would hold on to every model and optimiser that it was given
    return position.history


def check_state(folder: Path, identity: str) -> bool:
    """Whether a task's folder holds a state to go on from. Raises CheckpointError where it is another run's."""
    return _read_state(folder, identity) is not None


def forget_state(task_folder: Path) -> None:
    """Remove what a task keeps for going on."""
    remove_folder(task_folder / "state")


def make_optimizer(model: nn.Module, optim: Sgd | AdamW, rate_factors: Mapping[str, float]) -> torch.optim.Optimizer:
    """The optimiser of the parameters that train, in groups that differ in weight decay or learning rate.

    SGD decays every parameter, as PromptKD does; AdamW leaves out vectors and scalars (biases, norms,
    gates) and prompts.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(".tokens")
            decay = 0.0 if plain and isinstance(optim, AdamW) else optim.weight_decay
            groups.setdefault((decay, rate_factors.get(name, 1.0)), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]
    if isinstance(optim, Sgd):
        return torch.optim.SGD(settings, lr=optim.learning_rate, momentum=optim.momentum)
    return torch.optim.AdamW(settings, lr=optim.learning_rate)


def _run_epoch(
    task: Task,
    model: nn.Module,
    optimizer: Any,
    accelerator: Accelerator,
    position: _Position,
    wish: Callable[[], int | None],
    report: Report,
) -> None:
    """From the position to the end of its epoch, or to the step after which a stop was asked for."""
    started, first_step = time.monotonic(), position.step
    model.train()
    for batch in task.loader.epoch(position.epoch, position.step):
        _note_unreadable(task, batch, position, report)
        if len(batch) > 1:  # a batch that lost its images to damage is none
            _train_step(task, model, optimizer, accelerator, position, batch.to(accelerator.device))
        position.step += 1
        _report_progress(task, position, report)
        if wish() is not None and position.step < task.loader.steps_per_epoch:
            return
    images = (position.step - first_step) * task.loader.batch_size
    _finish_epoch(task, position, images / (time.monotonic() - started), report)


def _train_step(
    task: Task, model: nn.Module, optimizer: Any, accelerator: Accelerator, position: _Position, batch: Batch
) -> None:
    rate = learning_rate(task.optim, position.epoch, position.step, task.loader.steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    with accelerator.autocast():
        result = task.loss(model, batch, position.counted_steps == 0)
    accelerator.backward(result.loss)
    optimizer.step()
    optimizer.zero_grad()
    if result.probed:
        position.probed = result.probed
    # Summed on the device: reading a figure at every step would make the device wait for Python.
    for name, value in {"loss": result.loss, **result.figures}.items():
        value = value.detach().double() if accelerator.device.type != "mps" else value.detach()
        position.sums[name] = position.sums[name] + value if name in position.sums else value
    position.counted_steps += 1


def _finish_epoch(task: Task, position: _Position, images_per_second: float, report: Report) -> None:
    averages = {name: float(total) / position.counted_steps for name, total in position.sums.items()}
    if not position.counted_steps:
        raise DataError(f"{task.label}: no batch of this epoch had two readable images")
    if not math.isfinite(averages["loss"]):
        raise TrainingError(
            f"{task.label}: the loss is {averages['loss']} in epoch {position.epoch + 1}; lower the learning "
            "rate, or use precision fp32 or bf16. The state before this epoch is kept"
        )
    rate = learning_rate(task.optim, position.epoch, task.loader.steps_per_epoch - 1, task.loader.steps_per_epoch)
    figures = {**averages, **position.probed}
    epoch = position.epoch + 1
    last = epoch == task.optim.epochs
    if task.average is not None:
        _add_to_average(task.model, task.average[position.epoch], position)
        if last:  # what is scored is what is kept
            task.model.load_state_dict(position.kept, strict=False)
    if task.evaluate is not None and (last or (task.evaluate_every_epochs and epoch % task.evaluate_every_epochs == 0)):
        figures |= task.evaluate()
    if task.select is not None:
        figures["selection_score_percent"] = score = task.select()
        if score > position.best_score:
            tensors = {name: value.detach().clone() for name, value in _learned(task.model).items()}
            position.best_score, position.kept = score, tensors
    line = {
        "epoch": epoch,
        "learning_rate": rate,
        **figures,
        "unreadable": len(position.unreadable),
        "images_per_second": images_per_second,
    }
    position.history.append(line)
    write_text(task.folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in position.history))
    report(Epoch(epoch, task.optim.epochs, images_per_second, figures))
    position.epoch, position.step = epoch, 0
    position.sums, position.probed, position.counted_steps = {}, {}, 0


def _add_to_average(model: nn.Module, weight: float, position: _Position) -> None:
    for name, value in _learned(model).items():
        part = value.detach() * weight if value.is_floating_point() else value.detach().clone()
        before = position.kept.get(name)
        position.kept[name] = part if before is None or not value.is_floating_point() else before + part


def _report_progress(task: Task, position: _Position, report: Report) -> None:
    steps = task.loader.steps_per_epoch
    now = time.monotonic()
    if now - position.reported_at < REPORT_EVERY_SECONDS and position.step < steps:
        return
    position.reported_at = now
    figures = {name: float(total) / position.counted_steps for name, total in position.sums.items()}
    done = (position.epoch * steps + position.step) * task.loader.batch_size
    total = task.optim.epochs * steps * task.loader.batch_size
    report(Progress(f"{task.label} {position.epoch + 1}/{task.optim.epochs}", done, total, figures))


def _note_unreadable(task: Task, batch: Batch, position: _Position, report: Report) -> None:
    for problem in batch.unreadable:
        if problem not in position.unreadable:
            position.unreadable[problem] = None
            if len(position.unreadable) <= MOST_NAMED:
                report(Notice(f"unreadable, left out: {problem}"))
    if batch.unreadable:
        check_unreadable(list(position.unreadable), task.loader.image_count, task.unreadable_limit_percent)


def check_unreadable(problems: Sequence[str], images: int, limit_percent: float) -> None:
    """Raise DataError, naming them, where more than the limit of so many images can't be read."""
    share = 100 * len(problems) / images
    if share > limit_percent:
        named = "\n".join(f"  {problem}" for problem in problems[:MOST_NAMED])
        raise DataError(
            f"{len(problems)} of {images} images ({share:.3g} %) can't be read, more than "
            f"data.unreadable_limit_percent ({limit_percent:g} %); mend or remove them, or raise the limit:\n{named}"
        )


def _stopped_message(task: Task, position: _Position) -> str:
    where = f"epoch {position.epoch + 1} of {task.optim.epochs}, step {position.step + 1}"
    if position.epoch == task.optim.epochs:
        where = f"to write the result, the last of {task.optim.epochs} epochs being done"
    return f"stopped; the state is saved, next is {where}. To go on:\n  {task.resume_line}"


def _save_state(task: Task, optimizer: Any, accelerator: Accelerator, position: _Position) -> None:
    scaler = accelerator.scaler
    state = {
        "format": STATE_FORMAT,
        "identity": task.identity,
        "model": _learned(task.model),
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "epoch": position.epoch,
        "step": position.step,
        "sums": position.sums,
        "probed": position.probed,
        "counted_steps": position.counted_steps,
        "history": position.history,
        "unreadable": list(position.unreadable),
        "best_score": position.best_score,
        "kept": position.kept,
    }
    save_plain(task.state_file, state)


def _load_state(task: Task, optimizer: Any, accelerator: Accelerator) -> _Position | None:
    state = _read_state(task.folder, task.identity)
    if state is None:
        return None
    if set(state["model"]) != set(_learned(task.model)):
        raise CheckpointError(f"{task.state_file}: holds other tensors than this version trains; {_anew(task.folder)}")
    task.model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return _Position(
        epoch=state["epoch"],
        step=state["step"],
        sums={name: value.to(accelerator.device) for name, value in state["sums"].items()},
        probed=state["probed"],
        counted_steps=state["counted_steps"],
        history=state["history"],
        unreadable=dict.fromkeys(state["unreadable"]),
        best_score=state["best_score"],
        kept={name: value.to(accelerator.device) for name, value in state["kept"].items()},
    )


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training can change: all but the frozen parameters."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _read_state(folder: Path, identity: str) -> dict[str, Any] | None:
    """The saved state of a task, or None. Raises CheckpointError for a damaged one or another run's."""
    path = _state_file(folder)
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != STATE_FORMAT:
            raise ValueError(f"its format is {state['format']}")
    except Exception as error:  # torch and pickle raise many kinds for a damaged file
        raise CheckpointError(f"{path}: can't go on from this state ({error}); {_anew(folder)}") from error
    if state["identity"] != identity:
        raise CheckpointError(
            f"{path}: is the state of another run (the recipe, the images or the teacher changed since); "
            f"{_anew(folder)}, or keep both with another --runs folder"
        )
    return state


def _anew(folder: Path) -> str:
    return f"to start anew remove {folder / 'state'}, or use --fresh for a student"


def _state_file(folder: Path) -> Path:
    return folder / "state" / "state.pt"
