"""The training loop of both stages: steps and epochs, stopped at any step and resumed with the same result."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from comkd_cli.data.loaders import Batch
from comkd_cli.data.unreadable import MOST_NAMED, check_unreadable
from comkd_cli.errors import DataError, Interrupted, PeerError, TrainingError
from comkd_cli.events import Epoch, Notice, Progress, Report
from comkd_cli.files import write_text
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.devices import failures_explained, limited_threads
from comkd_cli.runtime.global_batch import share_batch_norms
from comkd_cli.runtime.signals import stop_requests
from comkd_cli.training.checkpoint import Checkpoint, checkpoint_file, seed_rank
from comkd_cli.training.finite import NumberWatch, check_weights, largest
from comkd_cli.training.optimizer import make_optimizer
from comkd_cli.training.position import Position
from comkd_cli.training.schedule import learning_rate
from comkd_cli.training.task import Task
from comkd_cli.training.tracking import Tracking

REPORT_EVERY_SECONDS = 0.5
FLUSH_EVERY_STEPS = 50
OVERFLOWS = "overflowed_steps"
"""Figure of an epoch in fp16: steps that the gradient scaler skipped."""
HALVINGS = 40
"""Of the gradient scaler's first scale, 2^16, after which no gradient overflows by the scale alone."""
RATE = "images_per_second"


class Trainer:
    """Trains the model of a task with the optimizer that its recipe names, from its checkpoint if there is one."""

    def __init__(self, task: Task, accelerator: Accelerator, report: Report) -> None:
        self.task = task
        self.accelerator = accelerator
        self.report = report
        if ranks.world_size() > 1:
            share_batch_norms(task.model, accelerator.device)
            accelerator.ddp_handler.find_unused_parameters = not task.uses_all_parameters
        self.optimizer = accelerator.prepare(make_optimizer(task.model, task.optim, task.rate_factors))
        with warnings.catch_warnings():  # PyTorch 2.14 renames this setting, and older versions lack the new name
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model: nn.Module = accelerator.prepare(task.model)
        self.checkpoint = Checkpoint(task, self.optimizer, accelerator)
        self.position = Position()
        self.numbers = NumberWatch(task)
        self._checks_each_step = accelerator.device.type == "cpu" and ranks.world_size() == 1  # nothing has to wait
        self._stop_code: Callable[[], int | None] = lambda: None  # set while fit runs
        self._reported_at = 0.0
        self._tracking: Tracking  # set while fit runs
        self._saved_at = time.monotonic()

    def fit(self) -> list[dict[str, float]]:
        """Train to the last epoch and return the figures of every epoch (see `Task.kept_figures`).

        The rate of the images is not among them: a file that holds the figures has the same bytes after every run.
        A checkpoint is saved at the end of every epoch, every `checkpoint_every_minutes` within it, and when the user
        or the scheduler asks the run to stop; the result does not depend on how often that happened. Raises
        Interrupted, TrainingError, DataError (too many unreadable images) or CheckpointError (a checkpoint of another
        run).
        """
        self._start()
        steps_done = self.position.epoch * self.task.loader.steps_per_epoch + self.position.step
        self._tracking = Tracking(self.task, steps_done, self.report)
        try:
            self._train()
        finally:
            self._tracking.finish()
        self._finish()
        return [{name: value for name, value in line.items() if name != RATE} for line in self.position.history]

    def _train(self) -> None:
        with limited_threads(self.task.threads), stop_requests() as self._stop_code, failures_explained():
            while self.position.epoch < self.task.optim.epochs:
                self._train_epoch()

    def _start(self) -> None:
        """Resume from the checkpoint, or seed a new run."""
        position = self.checkpoint.load(self.report)
        if position is None:
            seed_rank(self.task.seed)
            return
        self.position = position
        if position.epoch < self.task.optim.epochs:
            self.report(Notice(f"resuming from epoch {position.epoch + 1}, step {position.step + 1}"))

    def _train_epoch(self) -> None:
        """Train to the end of the epoch and save a checkpoint; if a stop was requested, raise Interrupted."""
        try:
            code = self._run_steps()
        except (RuntimeError, PeerError) as error:
            # A scheduler's SIGTERM also reaches the loader's workers. Their end may show up in the middle of a
            # step; the checkpoint to resume from is then the last one that was saved.
            if (code := self._stop_code()) is None:
                raise
            if checkpoint_file(self.task.folder).exists():
                message = "stopped; the last checkpoint is kept. To resume"
            else:
                message = "stopped before the first checkpoint. To start again"
            raise Interrupted(f"{message}:\n  {self.task.resume_line}", code) from error
        self._save()
        if code is not None:
            raise Interrupted(self._stopped_message(), code)

    def _save(self) -> None:
        """Save a checkpoint, unless something is not finite: then the one before is kept."""
        self.numbers.check()
        check_weights(self.task)
        self.checkpoint.save(self.position)
        self._saved_at = time.monotonic()

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint within the epoch."""
        return time.monotonic() - self._saved_at >= 60 * self.task.checkpoint_every_minutes

    def _run_steps(self) -> int | None:
        """Run the steps that are left of the epoch, or those up to the one after which a stop was requested.

        Returns the exit code of that stop, or None.
        """
        position, loader, alone = self.position, self.task.loader, ranks.world_size() == 1
        started, first_step = time.monotonic(), position.step
        self.model.train()
        for parts in loader.epoch(position.epoch, position.step):
            sizes, unreadable, code, is_due = _agree(parts, None if alone else self._stop_code(), self._is_due())
            self._note_unreadable(unreadable)
            if any(sizes):
                self._step(parts, sizes)
            position.step += 1
            self._report_progress()
            self._tracking.step(position.epoch * loader.steps_per_epoch + position.step, position.averages)
            if position.step % FLUSH_EVERY_STEPS == 0:
                self.task.objective.flush(epoch_ended=False)
                self.numbers.check()
            code = self._stop_code() if alone else code
            if code is not None and position.step < loader.steps_per_epoch:
                return code
            if is_due and position.step < loader.steps_per_epoch:
                self._save()
        self.numbers.check()
        images = (position.step - first_step) * loader.batch_size
        self._finish_epoch(images / (time.monotonic() - started))
        return max(row[0] for row in collectives.all_gather_ints([self._stop_code() or 0])) or None

    def _step(self, parts: Sequence[Batch], sizes: Sequence[int]) -> None:
        """One step of the optimizer on a batch, which goes through the model part by part.

        sizes: of the parts over all processes, 0 of those to leave out. A loss is the mean over this process's images
        of a part. It is scaled by their share in the whole batch, times the number of processes, since data-parallel
        training averages the gradients of the processes.
        """
        position, steps = self.position, self.task.loader.steps_per_epoch
        rate = learning_rate(self.task.optim, position.epoch, position.step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        chosen = [part for part, size in zip(parts, sizes, strict=True) if size]
        images = sum(sizes)
        for number, part in enumerate(chosen, start=1):
            probe = position.counted_steps == 0 and number == 1
            # Gradients are averaged over the processes once, at the last part.
            with self.accelerator.no_sync(self.model) if number < len(chosen) else nullcontext():
                with self.accelerator.autocast():
                    result = self.task.objective.loss(self.model, part.to(self.accelerator.device), probe)
                share = len(part) * ranks.world_size() / images
                self.accelerator.backward(result.loss * share if share != 1 else result.loss)
            if result.probed:
                position.probed = result.probed
            position.add({"loss": result.loss, **result.figures}, share)
            self.numbers.add(position, [part], {**result.figures, "loss": result.loss})
        self._finish_gradient(chosen)
        self._step_optimizer()
        self.optimizer.zero_grad()
        if self.task.ema_decay is not None:
            position.update_ema(self.task.model, self.task.ema_decay, position.epoch * steps + position.step)
        position.counted_steps += 1

    def _step_optimizer(self) -> None:
        """Change the weights; in fp16 count on the device whether the gradients overflowed, which lowers the scale.

        A fused optimizer does not tell the host what it skipped.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
            return
        one = torch.ones((), device=self.accelerator.device)
        before: Tensor = scaler.scale(one)
        self.optimizer.step()
        after: Tensor = scaler.scale(one)
        self.position.overflows = torch.as_tensor(self.position.overflows, device=one.device) + (after < before)

    def _finish_gradient(self, parts: Sequence[Batch]) -> None:
        """Clip the gradient of a step if the recipe says so, and let it be checked."""
        if self.task.optim.clip_gradient_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.task.optim.clip_gradient_norm)
        if self.accelerator.scaler is None:  # which skips steps whose gradients overflow, and lowers its scale
            gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
            self.numbers.add(self.position, parts, {"gradient": largest(gradients)})
        if self._checks_each_step:
            self.numbers.check()

    def _finish_epoch(self, images_per_second: float) -> None:
        """Score the model, keep its weights if they count, write metrics.jsonl, and move to the next epoch."""
        task, position = self.task, self.position
        position.average_over_ranks()
        averages = position.averages() if position.counted_steps else {}
        self._check_steps(averages)
        steps = task.loader.steps_per_epoch
        figures = {**averages, **position.probed}
        epoch = position.epoch + 1
        last = epoch == task.optim.epochs
        if task.average is not None:
            position.add_to_average(task.model, task.average[position.epoch])
        due = task.evaluate_every_epochs and epoch % task.evaluate_every_epochs == 0
        if last or due or task.select_by is not None:
            # Scored are the weights that would be kept if this were the last epoch.
            averaged = task.ema_decay is not None or (task.average is not None and last)
            with position.kept_in(task.model) if averaged else nullcontext():
                figures |= task.objective.evaluate()
        if task.select_by is not None:
            position.keep_if_best(task.model, figures[task.select_by])
        line = {
            "epoch": epoch,
            "learning_rate": learning_rate(task.optim, position.epoch, steps - 1, steps),
            **figures,
            "unreadable": len(position.unreadable),
            **({} if self.accelerator.scaler is None else {OVERFLOWS: int(position.overflows)}),
            RATE: images_per_second,
        }
        if task.select_by is not None:
            line["kept_epoch"] = task.kept_figures([*position.history, line])["epoch"]
        position.history.append(line)
        if ranks.is_main():
            write_text(task.folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in position.history))
        self._tracking.epoch(epoch * steps, line)
        self.report(Epoch(epoch, task.optim.epochs, images_per_second, figures, task.held_out, task.unit))
        position.next_epoch()

    def _check_steps(self, averages: dict[str, float]) -> None:
        """Refuse an epoch that had no images, or whose every step overflowed."""
        position = self.position
        if not averages:
            raise DataError(f"{self.task.label}: no batch of this epoch had two readable images")
        if int(position.overflows) == position.counted_steps >= HALVINGS:
            raise TrainingError(
                f"{self.task.label}: every step of epoch {position.epoch + 1} overflowed in fp16",
                remedy="use precision bf16 or fp32",
            )

    def _finish(self) -> None:
        """Put the kept weights into the model, and report which they are and what was left out."""
        task, position = self.task, self.position
        if position.kept:
            task.model.load_state_dict(position.kept, strict=False)
        if task.select_by is not None:
            kept = task.kept_figures(position.history)
            self.report(Notice(f"kept the weights of epoch {kept['epoch']:.0f}, which has the best {task.select_by}"))
        if skipped := sum(line.get(OVERFLOWS, 0) for line in position.history):
            self.report(Notice(f"{skipped:.0f} steps overflowed in fp16 and were skipped"))
        if position.unreadable:
            count = len(position.unreadable)
            self.report(Notice(f"{count} of {task.loader.image_count} images could not be read and were skipped"))
        self.accelerator.free_memory()  # it holds on to every model and optimizer that it prepared

    def _report_progress(self) -> None:
        task, position, steps = self.task, self.position, self.task.loader.steps_per_epoch
        now = time.monotonic()
        if now - self._reported_at < REPORT_EVERY_SECONDS and position.step < steps:
            return
        self._reported_at = now
        if ranks.world_size() == 1:
            self.numbers.check()
        done = (position.epoch * steps + position.step) * task.loader.batch_size
        total = task.optim.epochs * steps * task.loader.batch_size
        label = f"{task.label} {position.epoch + 1}/{task.optim.epochs}"
        self.report(Progress(label, done, total, position.averages(), task.unit))

    def _note_unreadable(self, problems: Sequence[str]) -> None:
        task, position = self.task, self.position
        for problem in problems:
            if problem not in position.unreadable:
                position.unreadable[problem] = None
                if len(position.unreadable) <= MOST_NAMED:
                    self.report(Notice(f"unreadable, skipped: {problem}"))
        if problems:
            check_unreadable(position.unreadable, task.loader.image_count, task.unreadable_limit_percent)

    def _stopped_message(self) -> str:
        position, epochs = self.position, self.task.optim.epochs
        if position.epoch == epochs:
            following = f"all {epochs} epochs are done, but the result has not been written yet"
        else:
            following = f"next is epoch {position.epoch + 1} of {epochs}, step {position.step + 1}"
        return f"stopped; checkpoint saved, {following}. To resume:\n  {self.task.resume_line}"


def _agree(parts: Sequence[Batch], code: int | None, is_due: bool) -> tuple[list[int], list[str], int | None, bool]:
    """Share a step's facts among all processes: each part's images, the unreadable ones, the code of a stop, and
    whether a checkpoint is due, by the clock of the main process.

    A part's size is set to 0 if it has fewer than two images, or if one process has none of them: a process without
    images cannot take part in what is computed over all processes.
    """
    problems = [problem for part in parts for problem in part.unreadable]
    rows = collectives.all_gather_ints([code or 0, is_due, len(problems), *map(len, parts)])
    codes, due, counts, *shares = [list(column) for column in zip(*rows, strict=True)]
    if any(counts):
        problems = [problem for of_rank in collectives.all_gather(problems) for problem in of_rank]
    sizes = [sum(share) if min(share) and sum(share) > 1 else 0 for share in shares]
    return sizes, problems, max(codes) or None, bool(due[0])
