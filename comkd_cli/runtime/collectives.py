"""Exchange of Python objects between the processes of one run.

Everything goes from host to host over gloo, so that no GPU waits for it. A single process gets its own object back.
Every process must call each function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed

from comkd_cli.errors import ComkdError, PeerError
from comkd_cli.runtime.ranks import is_main, world_size

T = TypeVar("T")

DEFAULT_TIMEOUT_MINUTES = 30.0
# From the messages of gloo, NCCL and torch's store.
TIMEOUTS = (
    "Timed out waiting",
    "Application timeout",
    "collective operation timeout",
    "wait timeout",
    "Socket Timeout",
)
ENDINGS = ("closed by peer", "remote process exited", "Connection reset")
BEAT_SECONDS = 5.0  # how often a process in `without_timeout` signals the others that it is alive

_timeout = timedelta(minutes=DEFAULT_TIMEOUT_MINUTES)


def set_timeout(minutes: float) -> None:
    """How long a process waits for the others before it fails. Call it before the first exchange of the run."""
    global _timeout
    _timeout = timedelta(minutes=minutes)


def timeout() -> timedelta:
    """How long a process waits for the others before it fails."""
    return _timeout


def all_gather_ints(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of every process, by rank; all must pass equally many."""
    if world_size() == 1:
        return [list(numbers)]
    with _failures_explained():
        return _table(numbers, _hosts())


def all_gather(item: T) -> list[T]:
    """The object of every process, by rank; objects are pickled."""
    if world_size() == 1:
        return [item]
    every: list[Any] = [None] * world_size()
    with _failures_explained():
        distributed.all_gather_object(every, item, group=_hosts())
    return every


def gather(item: T) -> list[T]:
    """As `all_gather` on the main process; an empty list on the others."""
    if world_size() == 1:
        return [item]
    every: list[Any] | None = [None] * world_size() if is_main() else None
    with _failures_explained():
        distributed.gather_object(item, every, dst=0, group=_hosts())
    return every or []


def broadcast(item: T) -> T:
    """Rank 0's object, such as whether a file exists, on which all processes must agree."""
    if world_size() == 1:
        return item
    sent: list[Any] = [item]
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
    """A block without a time limit, which all processes leave together.

    While a process works in it, one of its threads signals the others that it is alive. A process that died or is
    suspended fails the block after the timeout. Use it for work whose duration differs much between processes
    (downloads, indexing), not for work that may hang.
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
            # Finished processes wait in the exchange, so that those still working set the pace.
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
    """The main process runs the block before the others enter it, without a time limit."""
    if not is_main():
        with without_timeout():
            pass
        yield
        return
    with without_timeout():
        yield


def in_turn(work: Callable[[], T]) -> T:
    """The result of `work`, which the main process runs before the others. An error of one process is raised by all.

    So either all processes continue, or none does. There is no time limit.
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


@contextmanager
def main_holds(context: AbstractContextManager[object]) -> Iterator[None]:
    """A block that all processes run while the main one is within a context, such as a lock.

    An error of entering it is raised by all. The others wait for the main process without a time limit.
    """
    with ExitStack() as stack:
        in_turn(lambda: stack.enter_context(context) if is_main() else None)
        yield


def on_every_rank(work: Callable[[], T]) -> T:
    """As `in_turn`, but all processes run `work` at the same time. It must not communicate itself."""
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
    for error in all_gather(failure):
        if error is not None:
            raise error
    return done[0]


@contextmanager
def _failures_explained() -> Iterator[None]:
    """Turn a failed exchange into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if (explained := peer_error(error)) is None:
            raise
        raise explained from error


def peer_error(error: RuntimeError) -> PeerError | None:
    """The PeerError for an error of gloo or NCCL that means that another process hangs or exited; None for others."""
    message = str(error)
    if any(words in message for words in TIMEOUTS):
        return PeerError(
            f"another rank did not answer within {_timeout.total_seconds() / 60:g} minutes: it hangs, its machine is "
            "unreachable, or a step takes longer than that",
            remedy="rerun the same command to resume; if steps are slow, raise the recipe's collective_timeout_minutes",
        )
    if any(words in message for words in ENDINGS):
        return PeerError(
            "another process of this run exited", remedy="see its output for the error, then rerun to resume"
        )
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
