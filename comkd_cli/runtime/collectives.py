"""How processes that share one run exchange what they know.

Everything goes from host to host over gloo, so that no GPU waits for it. A single process gets back what it gave.
Each function must be called by every process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed

from comkd_cli.errors import ComkdError, PeerError
from comkd_cli.runtime.ranks import is_main, world_size

T = TypeVar("T")

DEFAULT_TIMEOUT_MINUTES = 30.0
# In the words of gloo, NCCL and torch's store.
TIMEOUTS = (
    "Timed out waiting",
    "Application timeout",
    "collective operation timeout",
    "wait timeout",
    "Socket Timeout",
)
ENDINGS = ("closed by peer", "remote process exited", "Connection reset")
BEAT_SECONDS = 5.0  # how often a process that works in an unlimited block tells the others that it is alive

_timeout = timedelta(minutes=DEFAULT_TIMEOUT_MINUTES)


def set_timeout(minutes: float) -> None:
    """How long a process waits for the others before it fails. Call it before the first exchange of the run."""
    global _timeout
    _timeout = timedelta(minutes=minutes)


def timeout() -> timedelta:
    """How long a process waits for the others before it fails."""
    return _timeout


def all_gather_ints(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of every process, by rank; all give as many."""
    if world_size() == 1:
        return [list(numbers)]
    with _failures_explained():
        return _table(numbers, _hosts())


def all_gather(thing: T) -> list[T]:
    """What every process gave, by rank; it is pickled on the way."""
    if world_size() == 1:
        return [thing]
    every: list[Any] = [None] * world_size()
    with _failures_explained():
        distributed.all_gather_object(every, thing, group=_hosts())
    return every


def gather(thing: T) -> list[T]:
    """As `all_gather` on the main process; the others get an empty list."""
    if world_size() == 1:
        return [thing]
    every: list[Any] | None = [None] * world_size() if is_main() else None
    with _failures_explained():
        distributed.gather_object(thing, every, dst=0, group=_hosts())
    return every or []


def broadcast(thing: T) -> T:
    """What the main process gave: all must agree on files that come and go."""
    if world_size() == 1:
        return thing
    sent: list[Any] = [thing]
    with _failures_explained():
        distributed.broadcast_object_list(sent, src=0, group=_hosts())
    result: T = sent[0]
    return result


def barrier() -> None:
    """Return once every process has called it."""
    if world_size() > 1:
        with _failures_explained():
            distributed.barrier(group=_hosts())


def destroy() -> None:
    """Close the connections to the others at the end of a command."""
    if world_size() > 1:
        distributed.destroy_process_group()


@contextmanager
def without_timeout() -> Iterator[None]:
    """A block that may take each process as long as it needs; all leave it together.

    The timeout does not count in it: while a process works, a thread of it tells the others that it is alive. A
    process that has died or is stopped fails the block after the timeout. Use it for work whose length differs much
    between processes (downloads, indexing), not for what may hang.
    """
    if world_size() == 1:
        yield
        return
    group = _alive()  # made by the main thread: all processes must make their groups in the same order
    done = threading.Event()
    failures: list[RuntimeError] = []

    def beat() -> None:
        pause = min(BEAT_SECONDS, _timeout.total_seconds() / 4)
        try:
            # Those that are done wait in the exchange, so that those at work alone set the pace.
            while not all(row[0] for row in _table([done.is_set()], group)):
                done.wait(pause)
        except RuntimeError as error:  # for the main thread to raise
            failures.append(error)

    thread = threading.Thread(target=beat, name="alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        with _failures_explained():
            raise failures[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process through the block before the others enter it, however long that takes."""
    if not is_main():
        with without_timeout():
            pass
        yield
        return
    with without_timeout():
        yield


def in_turn(work: Callable[[], T]) -> T:
    """What a piece of work gives, the main process doing it first. An error of one process is raised by all.

    So that all go on with the next piece of work or none does. It may take as long as it needs.
    """
    if world_size() == 1:
        return work()
    failure: ComkdError | OSError | None = None
    done: list[T] = []
    for turn in (is_main(), not is_main()):
        with without_timeout():
            if turn:
                try:
                    done.append(work())
                except (ComkdError, OSError) as error:
                    failure = error
    return _first_failure_or(failure, done)


def on_every_rank(work: Callable[[], T]) -> T:
    """As `in_turn`, but all processes do the work at the same time. It must not exchange anything itself."""
    if world_size() == 1:
        return work()
    failure: ComkdError | OSError | None = None
    done: list[T] = []
    with without_timeout():
        try:
            done.append(work())
        except (ComkdError, OSError) as error:
            failure = error
    return _first_failure_or(failure, done)


def _first_failure_or(failure: ComkdError | OSError | None, done: Sequence[T]) -> T:
    for met in all_gather(failure):
        if met is not None:
            raise met
    return done[0]


@contextmanager
def _failures_explained() -> Iterator[None]:
    """Say what a failed exchange means. Raises PeerError."""
    try:
        yield
    except RuntimeError as error:
        if (explained := peer_error(error)) is None:
            raise
        raise explained from error


def peer_error(error: RuntimeError) -> PeerError | None:
    """What gloo or NCCL mean by an error: that another process hangs or is gone; None for any other error."""
    said = str(error)
    if any(words in said for words in TIMEOUTS):
        return PeerError(
            f"another process of this run did not answer within {_timeout.total_seconds() / 60:g} minutes: it hangs, "
            "its machine is gone, or a step takes longer than that. The same command resumes the run; where steps "
            "are slow, raise collective_timeout_minutes in the recipe"
        )
    if any(words in said for words in ENDINGS):
        return PeerError("another process of this run ended; its own message says why")
    return None


def _table(numbers: Sequence[int], group: Any) -> list[list[int]]:
    mine = torch.tensor([int(number) for number in numbers], dtype=torch.int64)
    every = [torch.empty_like(mine) for _ in range(world_size())]
    distributed.all_gather(every, mine, group=group)
    return [row.tolist() for row in every]


@cache
def _hosts() -> Any:
    """The group that hosts exchange data in, whatever the devices' own is."""
    return distributed.new_group(backend="gloo", timeout=_timeout)


@cache
def _alive() -> Any:
    """The group of the threads of `without_timeout`, whose messages must not mix with the main threads'."""
    return distributed.new_group(backend="gloo", timeout=_timeout)
