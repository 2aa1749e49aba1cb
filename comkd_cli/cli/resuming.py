"""The command that resumes an interrupted `comkd distill`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from comkd_cli.runtime import ranks


class Choice(NamedTuple):
    """A dataset and a seed, as the command line names them; None if it names none."""

    dataset: str | None
    seed: int | None

    def settings(self) -> list[str]:
        """The recipe settings that select them, as for --set."""
        named = {"data.dataset": self.dataset, "seed": self.seed}
        return [f"{field}={value}" for field, value in named.items() if value is not None]


@dataclass(frozen=True)
class StoppedRun:
    """The run that a command was making when it stopped."""

    choices: Sequence[Choice]
    """Of every run of the command, in order."""
    position: int
    """Of the stopped run among them."""
    fresh: bool
    """Whether the command has --fresh."""

    @property
    def resume_teacher(self) -> str:
        """The command that resumes the run from its teacher.

        It keeps --fresh: the existing student is discarded only when the teacher is ready.
        """
        return self._resume(keep_fresh=self.fresh)

    @property
    def resume_student(self) -> str:
        """The command that resumes the run from its student, without --fresh, which would discard the checkpoint."""
        return self._resume(keep_fresh=False)

    @property
    def alone(self) -> str:
        """The command that makes this run and no other, without --fresh."""
        words = [word for word in sys.argv[1:] if word != "--fresh"]
        if len(self.choices) > 1:
            words = _with_choices(_without_choices(words), [self.choices[self.position]])
        return _command(words)

    def _resume(self, keep_fresh: bool) -> str:
        """The command as it was typed; with --fresh and several runs, one command for each kind of run that is left.

        The stopped run is resumed, the runs that had not started keep --fresh, and finished runs are not repeated.
        """
        words = sys.argv[1:]
        if not self.fresh:
            return _command(words)
        without_fresh = [word for word in words if word != "--fresh"]
        if len(self.choices) == 1:
            return _command(words if keep_fresh else without_fresh)
        base = _without_choices(without_fresh)
        not_started = self.choices[self.position + (not keep_fresh) :]
        commands = [_with_choices(base, group, "--fresh") for group in _combined(not_started)]
        if not keep_fresh:
            commands.insert(0, _with_choices(base, [self.choices[self.position]]))
        return " &&\n  ".join(map(_command, commands))


@dataclass(frozen=True)
class ReproducedRun(StoppedRun):
    """A run of `comkd reproduce`, which has no --fresh: the same command resumes it."""

    distill: Sequence[str]
    """The words of the `comkd distill` that makes the same run alone."""

    @property
    def alone(self) -> str:
        """This `comkd distill`, to which --fresh can be added."""
        return _command(self.distill)


def _combined(choices: Sequence[Choice]) -> list[list[Choice]]:
    """The choices grouped into as few commands as possible: consecutive datasets with the same seeds share one."""
    by_dataset = [list(group) for _, group in groupby(choices, key=lambda choice: choice.dataset)]
    by_seeds = groupby(by_dataset, key=lambda group: [choice.seed for choice in group])
    return [[choice for group in groups for choice in group] for _, groups in by_seeds]


def _without_choices(words: Sequence[str]) -> list[str]:
    """The words of a command without --all, --dataset and --seed."""
    kept: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word in ("--dataset", "--seed"):
            next(remaining, None)
        elif word != "--all" and not word.startswith(("--dataset=", "--seed=")):
            kept.append(word)
    return kept


def _with_choices(words: Sequence[str], choices: Sequence[Choice], *more: str) -> list[str]:
    """The words of a command with options for all of these datasets and seeds, before a `--` that ends options."""
    datasets = [f"--dataset={name}" for name in dict.fromkeys(name for name, _ in choices) if name is not None]
    seeds = [f"--seed={seed}" for seed in dict.fromkeys(seed for _, seed in choices) if seed is not None]
    at = words.index("distill") + 1 if "distill" in words else 0
    return [*words[:at], *datasets, *seeds, *more, *words[at:]]


def _command(words: Sequence[str]) -> str:
    if ranks.world_size() == 1:
        return shlex.join(["comkd", *words])
    launcher = "torchrun ..." if ranks.on_several_machines() else f"torchrun --nproc-per-node {ranks.per_machine()}"
    return f"{launcher} -m comkd_cli {shlex.join(words)}"
