"""What processes that work on one run say to one another.

It goes from host to host over gloo: no GPU has to wait for it. Alone, a process is told what it says itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed

from comkd_cli.errors import ComkdError
from comkd_cli.launch import is_main, world_size

T = TypeVar("T")

# One may wait long for another that indexes or saves. Whoever dies is met by the launcher, which ends all.
PATIENCE = timedelta(hours=24)


def table(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of every process, by rank; all give as many. Each process must call it."""
    if world_size() == 1:
        return [list(numbers)]
    mine = torch.tensor(list(numbers), dtype=torch.int64)
    every = [torch.empty_like(mine) for _ in range(world_size())]
    distributed.all_gather(every, mine, group=_hosts())
    return [row.tolist() for row in every]


def gathered(thing: T) -> list[T]:
    """What every process gave, by rank; it is pickled on the way. Each process must call it."""
    if world_size() == 1:
        return [thing]
    every: list[Any] = [None] * world_size()
    distributed.all_gather_object(every, thing, group=_hosts())
    return every


def gathered_on_main(thing: T) -> list[T]:
    """As `gathered`, but the others than the main process are given nothing."""
    if world_size() == 1:
        return [thing]
    every: list[Any] | None = [None] * world_size() if is_main() else None
    distributed.gather_object(thing, every, dst=0, group=_hosts())
    return every or []


def as_main_sees(thing: T) -> T:
    """What the main process gave: of files that come and go, all must think alike. Each process must call it."""
    if world_size() == 1:
        return thing
    told: list[Any] = [thing]
    distributed.broadcast_object_list(told, src=0, group=_hosts())
    result: T = told[0]
    return result


def wait_for_all() -> None:
    """Return once every process is here."""
    if world_size() > 1:
        distributed.barrier(group=_hosts())


def leave() -> None:
    """Take leave of the others, at the end of a command; they do the same."""
    if world_size() > 1:
        distributed.destroy_process_group()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process through the block before the others enter it."""
    if not is_main():
        wait_for_all()
    try:
        yield
    finally:
        if is_main():  # also where it failed: the others meet that themselves
            wait_for_all()


def agreed(work: Callable[[], T]) -> T:
    """What a piece of work gives, the main process doing it first. An error of one process is raised by all.

    So that all go on with the next piece of work or none does. Each process must call it.
    """
    if world_size() == 1:
        return work()
    done: list[T] = []
    failure: ComkdError | None = None
    with main_first():
        try:
            done.append(work())
        except ComkdError as error:
            failure = error
    for met in gathered(failure):
        if met is not None:
            raise met
    return done[0]


@cache
def _hosts() -> Any:
    """The group that hosts talk in, whatever the devices' own is."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)
