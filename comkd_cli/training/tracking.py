"""Figures of a training for TensorBoard, Weights & Biases, MLflow and Trackio, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import tracking

from comkd_cli.errors import first_line
from comkd_cli.events import Notice, Report
from comkd_cli.runtime import ranks
from comkd_cli.training.task import Task

PROJECT = "comkd"


class Tracking:
    """Sends figures to trackers, only from the main process.

    A tracker never ends a run: one that cannot be started, or that fails, is reported in one notice and no longer used.
    """

    def __init__(self, task: Task, first_step: int, report: Report) -> None:
        """first_step: the steps that were done before, of a run that is resumed."""
        self._every_steps, self._label, self._report = task.track_every_steps, task.label, report
        self._trackers: dict[str, Any] = {}
        for name in dict.fromkeys(task.track) if ranks.is_main() else ():
            self._attempt(name, partial(self._start, name, task.folder, first_step))

    def step(self, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """Send the figures so far of an epoch every `every_steps` steps. step: from 1, over all epochs.

        figures: called only if they are sent, since reading them waits for a GPU.
        """
        if self._trackers and self._every_steps and step % self._every_steps == 0:
            self._send(f"{self._label}/step", figures(), step)

    def epoch(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of an epoch that ended after a step."""
        self._send(self._label, figures, step)

    def finish(self) -> None:
        """Close the trackers, at the end of a run and when it is stopped."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.finish)
        self._trackers.clear()

    def _send(self, prefix: str, figures: Mapping[str, float], step: int) -> None:
        values = {f"{prefix}/{name}": float(value) for name, value in figures.items()}
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, partial(tracker.log, values, step=step))

    def _start(self, name: str, folder: Path, first_step: int) -> None:
        run = "/".join(folder.parts[-3:])
        arguments: dict[str, dict[str, Any]] = {
            # purge_step hides what an interrupted or discarded run has logged after this step.
            "tensorboard": {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": first_step + 1},
            "wandb": {"run_name": PROJECT, "name": run, "dir": str(folder)},
            "mlflow": {"experiment_name": PROJECT, "logging_dir": str(folder / "mlflow"), "run_name": run},
            "trackio": {"run_name": PROJECT, "name": run},
        }
        kind = tracking.LOGGER_TYPE_TO_CLASS.get(name)
        if kind is None:
            raise RuntimeError("this version of accelerate does not know it; upgrade accelerate")
        tracker = kind(**arguments[name])
        if hasattr(tracker, "start"):  # older versions of accelerate start it when it is made
            tracker.start()
        self._trackers[name] = tracker

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a tracker, its service or the connection raises
            self._trackers.pop(name, None)
            remedy = f"; install it with pip install 'comkd[{name}]'" if isinstance(error, ImportError) else ""
            text = f"{self._label}: the tracker {name} failed and is no longer used: {first_line(error)}{remedy}"
            self._report(Notice(text))
