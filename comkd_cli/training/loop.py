"""The training loop that both stages share: steps, epochs, saved state, and going on from it exactly."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from comkd_cli.data.loaders import Batch, TrainingLoader
from comkd_cli.data.transforms import stable_seed
from comkd_cli.data.unreadable import MOST_NAMED, check_unreadable
from comkd_cli.errors import CheckpointError, DataError, Interrupted, PeerError, TrainingError
from comkd_cli.events import Epoch, Notice, Progress, Report
from comkd_cli.files import is_newer_format, remove_folder, write_text
from comkd_cli.models.checkpoints import save_plain
from comkd_cli.recipe.identity import Identity, described
from comkd_cli.recipe.model import AdamW, Sgd
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.allocator import keep_freed_memory
from comkd_cli.runtime.devices import failures_explained, needs_cpu
from comkd_cli.runtime.global_batch import share_batch_norms
from comkd_cli.runtime.signals import stop_requests
from comkd_cli.training.schedule import learning_rate

STATE_FORMAT = "comkd-state/4"
REPORT_EVERY_SECONDS = 0.5
KEEP_EVERY_STEPS = 50


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
    identity: Identity
    """All that decides the result; a state with another one is refused."""
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
    select_by: str | None = None
    """One of the figures of `evaluate`, which is then called at every epoch's end: the weights of the epoch with the
    highest are kept, of several the first's; not the last epoch's."""
    average: Sequence[float] | None = None
    """A weight for each epoch, summing to 1: what is kept is the average of the epochs' weights."""
    keep: Callable[[bool], None] | None = None
    """Called every KEEP_EVERY_STEPS steps and before the state is saved, by all processes together: puts away what
    the steps left behind. Its argument: whether the state is to be saved."""
    uses_all_parameters: bool = False
    """Whether each step gives every parameter that trains a gradient, which spares data-parallel training a search."""

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
    """With `select_by`: of the best epoch so far."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """With `select_by` the tensors of the best epoch so far, with `average` their weighted sum."""
    reported_at: float = 0.0


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's view of the machine: device, autocast, gradient scaling. Raises TrainingError.

    Several processes wait for one another as long as collectives.set_timeout says.
    """
    handlers = [
        InitProcessGroupKwargs(timeout=collectives.timeout()),
        # Batch norms share their statistics, so that their buffers are equal without being sent around.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision, cpu=needs_cpu(), kwargs_handlers=handlers
        )
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"precision: {precision} does not work on this machine: {error}") from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would train in fp32 and not say so.
        raise TrainingError("precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if accelerator.num_processes != ranks.world_size():
        raise TrainingError(
            f"the launcher says {ranks.world_size()} processes and accelerate {accelerator.num_processes}; start "
            "comkd by torchrun or `accelerate launch`"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def fit(task: Task, accelerator: Accelerator, report: Report) -> list[dict[str, float]]:
    """Train to the last epoch, going on from a saved state where there is one.

    The state is saved at every epoch's end and when a stop is asked for; what comes out does not depend
    on how often that happened. Returns the figures of every epoch (see `kept_figures`). Raises Interrupted,
    TrainingError, DataError (too many unreadable images) or CheckpointError (a state of something else).
    """
    if ranks.world_size() > 1:
        share_batch_norms(task.model, accelerator.device)
        accelerator.ddp_handler.find_unused_parameters = not task.uses_all_parameters
    optimizer = accelerator.prepare(make_optimizer(task.model, task.optim, task.rate_factors))
    with warnings.catch_warnings():  # PyTorch 2.14 has a new name for this setting, which older ones do not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = accelerator.prepare(task.model)
    position = _load_state(task, optimizer, accelerator)
    if position is None:
        position = _Position()
        _seed(task.seed)
    elif position.epoch < task.optim.epochs:
        report(Notice(f"going on from epoch {position.epoch + 1}, step {position.step + 1}"))
    with stop_requests() as wish, failures_explained():
        while position.epoch < task.optim.epochs:
            try:
                code = _run_epoch(task, model, optimizer, accelerator, position, wish, report)
            except (RuntimeError, PeerError) as error:
                # A scheduler's SIGTERM reaches the workers too. Their death may be met in the middle of a
                # step, so what is gone on with is the state of the last epoch's end.
                if (code := wish()) is None:
                    raise
                message = f"stopped; the last finished epoch is saved. To go on:\n  {task.resume_line}"
                raise Interrupted(message, code) from error
            _save_state(task, optimizer, accelerator, position)
            if code is not None:
                raise Interrupted(_stopped_message(task, position), code)
    if position.kept:
        task.model.load_state_dict(position.kept, strict=False)
    if task.select_by is not None:
        kept = kept_figures(task, position.history)
        report(Notice(f"kept the weights of epoch {kept['epoch']:.0f}, which has the best {task.select_by}"))
    if position.unreadable:
        count = len(position.unreadable)
        report(Notice(f"{count} of {task.loader.image_count} images could not be read and were left out"))
    accelerator.free_memory()  # it would hold on to every model and optimiser that it was given
    return position.history


def kept_figures(task: Task, history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of the weights that the task keeps: the last epoch's, or those of the epoch that was selected."""
    if task.select_by is None:
        return history[-1]
    key = task.select_by
    return max(history, key=lambda line: line[key])  # of several the first, as the weights are


def _seed(seed: int) -> None:
    """Seed what the model draws: each process its own, the main one by the seed itself."""
    torch.manual_seed(seed if ranks.is_main() else stable_seed("process", ranks.rank(), seed))


def has_checkpoint(folder: Path, identity: Identity) -> bool:
    """Whether a task's folder holds a state to go on from. Raises CheckpointError where it is another run's."""
    return _read_state(folder, identity) is not None


def delete_checkpoint(task_folder: Path) -> None:
    """Remove what a task keeps for going on; of several processes the main one does."""
    if ranks.is_main():
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
) -> int | None:
    """From the position to the end of its epoch, or to the step after which a stop was asked for.

    Returns the exit code of that stop, or None.
    """
    started, first_step = time.monotonic(), position.step
    alone = ranks.world_size() == 1
    model.train()
    for parts in task.loader.epoch(position.epoch, position.step):
        sizes, unreadable, code = _agree(parts, None if alone else wish())
        _note_unreadable(task, unreadable, position, report)
        if any(sizes):
            _train_step(task, model, optimizer, accelerator, position, parts, sizes)
        position.step += 1
        _report_progress(task, position, report)
        if task.keep is not None and position.step % KEEP_EVERY_STEPS == 0:
            task.keep(False)
        code = wish() if alone else code
        if code is not None and position.step < task.loader.steps_per_epoch:
            return code
    images = (position.step - first_step) * task.loader.batch_size
    _finish_epoch(task, position, accelerator, images / (time.monotonic() - started), report)
    return max(row[0] for row in collectives.all_gather_ints([wish() or 0])) or None


def _agree(parts: Sequence[Batch], code: int | None) -> tuple[list[int], list[str], int | None]:
    """What all processes must know of a step: each part's images, what can't be read, and whether one is to stop.

    A part counts as empty where it has no two images, or a process none of them: who has no images could not take
    part in what is computed together.
    """
    problems = [problem for part in parts for problem in part.unreadable]
    rows = collectives.all_gather_ints([code or 0, len(problems), *map(len, parts)])
    codes, troubles, *shares = [list(column) for column in zip(*rows, strict=True)]
    if any(troubles):
        problems = [problem for share in collectives.all_gather(problems) for problem in share]
    sizes = [sum(share) if min(share) and sum(share) > 1 else 0 for share in shares]
    return sizes, problems, max(codes) or None


def _train_step(
    task: Task,
    model: nn.Module,
    optimizer: Any,
    accelerator: Accelerator,
    position: _Position,
    parts: Sequence[Batch],
    sizes: Sequence[int],
) -> None:
    """One step of the optimiser on a batch, which goes through the model part by part.

    Losses are means over a part's images here; each counts by its share in the batch of all processes, whose
    average data-parallel training takes. sizes: of the parts over all processes, 0 of those to leave out.
    """
    rate = learning_rate(task.optim, position.epoch, position.step, task.loader.steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    whole = [(part, size) for part, size in zip(parts, sizes, strict=True) if size]
    images = sum(size for _, size in whole)
    for number, (part, _size) in enumerate(whole, start=1):
        probe = position.counted_steps == 0 and number == 1
        waiting = accelerator.no_sync(model) if number < len(whole) else nullcontext()
        with waiting:
            with accelerator.autocast():
                result = task.loss(model, part.to(accelerator.device), probe)
            share = len(part) * ranks.world_size() / images
            accelerator.backward(result.loss * share if share != 1 else result.loss)
        if result.probed:
            position.probed = result.probed
        # Summed on the device: reading a figure at every step would make the device wait for Python.
        for name, value in {"loss": result.loss, **result.figures}.items():
            value = value.detach().double() if accelerator.device.type != "mps" else value.detach()
            value = value * share
            position.sums[name] = position.sums[name] + value if name in position.sums else value
    optimizer.step()
    optimizer.zero_grad()
    position.counted_steps += 1


def _share_sums(position: _Position) -> None:
    """Make the sums of every process those of all: their average, since each counts by its share."""
    if ranks.world_size() == 1 or not position.sums:
        return
    values = torch.stack(list(position.sums.values()))
    means = torch.tensor(collectives.all_gather(values.tolist()), dtype=values.dtype).mean(0).to(values.device)
    position.sums = dict(zip(position.sums, means, strict=True))


def _finish_epoch(
    task: Task, position: _Position, accelerator: Accelerator, images_per_second: float, report: Report
) -> None:
    _share_sums(position)
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
    due = task.evaluate_every_epochs and epoch % task.evaluate_every_epochs == 0
    if task.evaluate is not None and (last or due or task.select_by is not None):
        figures |= task.evaluate()
    if task.select_by is not None and (score := figures[task.select_by]) > position.best_score:
        tensors = {name: value.detach().clone() for name, value in _learned(task.model).items()}
        position.best_score, position.kept = score, tensors
    line = {
        "epoch": epoch,
        "learning_rate": rate,
        **figures,
        "unreadable": len(position.unreadable),
        "images_per_second": images_per_second,
    }
    if task.select_by is not None:
        line["kept_epoch"] = kept_figures(task, [*position.history, line])["epoch"]
    position.history.append(line)
    if ranks.is_main():
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


def _note_unreadable(task: Task, problems: Sequence[str], position: _Position, report: Report) -> None:
    for problem in problems:
        if problem not in position.unreadable:
            position.unreadable[problem] = None
            if len(position.unreadable) <= MOST_NAMED:
                report(Notice(f"unreadable, left out: {problem}"))
    if problems:
        check_unreadable(position.unreadable, task.loader.image_count, task.unreadable_limit_percent)


def _stopped_message(task: Task, position: _Position) -> str:
    where = f"epoch {position.epoch + 1} of {task.optim.epochs}, step {position.step + 1}"
    if position.epoch == task.optim.epochs:
        where = f"to write the result, the last of {task.optim.epochs} epochs being done"
    return f"stopped; the state is saved, next is {where}. To go on:\n  {task.resume_line}"


def _save_state(task: Task, optimizer: Any, accelerator: Accelerator, position: _Position) -> None:
    """Save where the run is: by the main process, and once it returns the file is there for all."""
    if task.keep is not None:
        task.keep(True)
    _share_sums(position)
    random = collectives.all_gather((torch.get_rng_state(), _cuda_random()))
    with collectives.without_timeout():  # disks can be slow
        if ranks.is_main():
            _write_state(task, optimizer, accelerator, position, random)


def _write_state(
    task: Task,
    optimizer: Any,
    accelerator: Accelerator,
    position: _Position,
    random: Sequence[tuple[Tensor, Tensor | None]],
) -> None:
    scaler = accelerator.scaler
    state = {
        "format": STATE_FORMAT,
        "identity": dict(task.identity.parts),
        "model": _learned(task.model),
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": [on_cpu for on_cpu, _ in random],
        "random_cuda": [on_cuda for _, on_cuda in random],
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


def _cuda_random() -> Tensor | None:
    """The state of this process's GPU's generator."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _load_state(task: Task, optimizer: Any, accelerator: Accelerator) -> _Position | None:
    state = _read_state(task.folder, task.identity)
    found = [bool(row[0]) for row in collectives.all_gather_ints([state is not None])]
    if any(found) != all(found):
        raise CheckpointError(f"{task.folder}: not every process finds the saved state; --runs must be a shared folder")
    if state is None:
        return None
    if set(state["model"]) != set(_learned(task.model)):
        raise CheckpointError(f"{task.state_file}: holds other tensors than this version trains; {_anew(task.folder)}")
    task.model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if len(state["random"]) == ranks.world_size():
        torch.set_rng_state(state["random"][ranks.rank()])
        if (on_cuda := state["random_cuda"][ranks.rank()]) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(on_cuda)
    else:  # others draw from here on; the images and their order stay the same
        _seed(stable_seed(task.seed, state["epoch"], state["step"]))
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


def _read_state(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """The saved state of a task, or None. Raises CheckpointError for a damaged one or another run's."""
    path = _state_file(folder)
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if is_newer_format(state["format"], STATE_FORMAT):
            raise ValueError(f"a newer comkd wrote it, with the format {state['format']}; upgrade comkd")
        if state["format"] != STATE_FORMAT:
            raise ValueError(f"its format is {state['format']}, of another version of comkd")
    except Exception as error:  # torch and pickle raise many kinds for a damaged file
        raise CheckpointError(f"{path}: can't go on from this state ({error}); {_anew(folder)}") from error
    if differences := identity.differences(state["identity"], "this checkpoint"):
        raise CheckpointError(
            f"{path}: cannot resume from this checkpoint: {described(differences)}; {_anew(folder)}, or keep both with "
            "another --runs folder"
        )
    return state


def _anew(folder: Path) -> str:
    return f"to start anew remove {folder / 'state'}, or use --fresh for a student"


def _state_file(folder: Path) -> Path:
    return folder / "state" / "state.pt"
