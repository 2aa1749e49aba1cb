"""The number of processes of the run, as torchrun and `accelerate launch` start them, and the rank of this one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from comkd_cli.edge.machine import cores_of_affinity as cores_of_affinity
from comkd_cli.edge.machine import usable_cores as usable_cores

T = TypeVar("T")


def world_size() -> int:
    """The number of processes of the run."""
    # A batch script may use WORLD_SIZE for its own purposes; only a launcher sets all three.
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if launched else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and to the terminal."""
    return rank() == 0


def per_machine() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def on_several_machines() -> bool:
    """Whether some processes are on another machine."""
    return per_machine() < world_size()


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of some work: every n-th, so that parts differ by one at most."""
    return items[rank() :: world_size()]
