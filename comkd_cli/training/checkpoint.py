"""The checkpoint of a training run: written whole, refused if it is another run's, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from comkd_cli.data.transforms import stable_seed
from comkd_cli.errors import CheckpointError
from comkd_cli.events import Notice, Report
from comkd_cli.method.student import learned_state
from comkd_cli.recipe.identity import Identity, described
from comkd_cli.runtime import collectives, ranks
from comkd_cli.training.optimizer import load_optimizer_state
from comkd_cli.training.position import Position
from comkd_cli.training.state_files import (
    STATE_FORMAT,
    Found,
    checkpoint_file,
    delete_checkpoint,
    read_state,
    restart_remedy,
    write_state,
)
from comkd_cli.training.task import Task

__all__ = ["Checkpoint", "checkpoint_file", "delete_checkpoint", "has_checkpoint", "seed_rank"]


def has_checkpoint(folder: Path, identity: Identity) -> bool:
    """Whether a task's folder holds a checkpoint. Raises CheckpointError for a damaged one or another run's."""
    return _read(folder, identity) is not None


def seed_rank(seed: int) -> None:
    """Seed what the model draws: the main process by the seed itself, each other one by its own seed."""
    torch.manual_seed(seed if ranks.is_main() else stable_seed("process", ranks.rank(), seed))


@dataclass(frozen=True)
class Checkpoint:
    """Saves and restores a run: its learned tensors, optimizer, gradient scaler, random generators and position."""

    task: Task
    optimizer: Any
    """As accelerate wrapped it."""
    accelerator: Accelerator

    def save(self, position: Position) -> None:
        """Write the checkpoint. The main process writes; on return it exists for all processes."""
        self.task.objective.flush(epoch_ended=position.step == 0)
        position.average_over_ranks()
        random = collectives.all_gather((torch.get_rng_state(), _cuda_random_state()))
        with collectives.without_timeout():  # disks can be slow
            if ranks.is_main():
                write_state(self.task.folder, self._state(position, random))

    def _state(self, position: Position, random: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "format": STATE_FORMAT,
            "identity": dict(self.task.identity.parts),
            "model": learned_state(self.task.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": [on_cpu for on_cpu, _ in random],
            "random_cuda": [on_cuda for _, on_cuda in random],
            "epoch": position.epoch,
            "step": position.step,
            "sums": position.sums,
            "probed": position.probed,
            "counted_steps": position.counted_steps,
            "overflows": int(position.overflows),
            "history": position.history,
            "unreadable": list(position.unreadable),
            "best_score": position.best_score,
            "kept": position.kept,
        }

    def load(self, report: Report) -> Position | None:
        """Restore the run and return where it stopped; None if there is no checkpoint.

        A damaged checkpoint is reported and deleted, and the one before it is used. Raises CheckpointError.
        """
        folder = self.task.folder
        found = _read(folder, self.task.identity)
        position = [-1, -1] if found is None else [found.state["epoch"], found.state["step"]]
        if any(row != position for row in collectives.all_gather_ints(position)):
            raise CheckpointError(
                "not every process finds the same checkpoint",
                path=folder,
                remedy="use a shared folder as --runs",
            )
        if found is None:
            return None
        for path, reason in found.damaged.items():
            report(Notice(f"{path}: is damaged ({reason}); the checkpoint before it is used"))
        found.delete_damaged()
        state = found.state
        if set(state["model"]) != set(learned_state(self.task.model)):
            raise CheckpointError(
                "holds different tensors from those that this version trains",
                path=found.path,
                remedy=restart_remedy(folder),
            )
        self.task.model.load_state_dict(state["model"], strict=False)
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._restore_random_state(state)
        device = self.accelerator.device
        return Position(
            epoch=state["epoch"],
            step=state["step"],
            sums={name: value.to(device) for name, value in state["sums"].items()},
            probed=state["probed"],
            counted_steps=state["counted_steps"],
            overflows=state.get("overflows", 0),  # absent in checkpoints of older versions
            history=state["history"],
            unreadable=dict.fromkeys(state["unreadable"]),
            best_score=state["best_score"],
            kept={name: value.to(device) for name, value in state["kept"].items()},
        )

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        if len(state["random"]) != ranks.world_size():
            # Dropout differs from here on; the images, their crops and their order do not.
            seed_rank(stable_seed(self.task.seed, state["epoch"], state["step"]))
            return
        torch.set_rng_state(state["random"][ranks.rank()])
        if (on_cuda := state["random_cuda"][ranks.rank()]) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(on_cuda)


def _read(folder: Path, identity: Identity) -> Found | None:
    """The newest whole checkpoint of a task. Raises CheckpointError if all are damaged, or it is another run's."""
    found = read_state(folder)
    if found is not None and (differences := identity.differences(found.state["identity"], "this checkpoint")):
        raise CheckpointError(
            "cannot resume from this checkpoint",
            path=found.path,
            found=described(differences),
            remedy=f"{restart_remedy(folder)}, or keep both with another --runs folder",
        )
    return found


def _cuda_random_state() -> Tensor | None:
    """The state of the generator of this process's GPU."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None
