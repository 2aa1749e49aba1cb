"""DataLoader's worker processes: they survive a stop request until the step is saved, and end with their parent."""

from __future__ import annotations

import atexit
import multiprocessing.util  # its handler at exit must be registered before ours: the last one runs first
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache, partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from comkd_cli.data.batches import Batch, CropIndex, Item, collate
from comkd_cli.data.reading import Reading
from comkd_cli.errors import TrainingError, first_line
from comkd_cli.runtime.devices import add_explanation

DEATH_NOTICE_SECONDS = 2
"""How long the system may take to report the death of a worker whose connection is broken already."""

_LOADERS: WeakSet[DataLoader[Item]] = WeakSet()
"""Those in use, to find the image that a dead worker was reading."""
_LEFT: deque[tuple[Reading, Any]] = deque(maxlen=4)
"""What the workers read, and the images, of loaders that were left in the middle: perhaps by an error, which is
explained when the loader is gone."""

Batches = Sampler[list[CropIndex]] | list[list[CropIndex]] | list[list[int]]
"""What each batch is made of, as DataLoader's `batch_sampler` accepts it."""


def data_loader(
    items: Dataset[Item], batches: Batches, sharing: Sequence[int], workers: int, persistent: bool = False
) -> DataLoader[Item]:
    """A DataLoader of batches. persistent: keep the workers from one epoch to the next."""
    if workers:
        _prepare_for_workers()
    loader = DataLoader(
        items,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(collate, sharing=sharing),
        worker_init_fn=partial(_prepare_worker, Reading(workers)),
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed each epoch; from the global generator that draw would make a resumed
        # run differ from an uninterrupted one.
        generator=torch.Generator(),
    )
    _LOADERS.add(loader)
    return loader


def can_fork() -> bool:
    """Whether workers are forked, in a moment; a spawned one imports torch first, for seconds."""
    return multiprocessing.get_start_method() == "fork"


def batches_of(loader: DataLoader[Item]) -> Iterator[Batch]:
    """The batches of a loader.

    Raises TrainingError, with the image, if a worker dies while it reads one; otherwise RuntimeError, even if it
    dies while it sends a batch.

    torch raises such an error itself, with the cause, as soon as the system reports the death: also in the code that
    uses a batch, where `failures_explained` finds the image. A broken connection may be noticed before that; then wait
    for torch's error.
    """
    batches = iter(loader)
    while True:
        try:
            batch: Any = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if loader.num_workers == 0 or "in DataLoader worker process" in str(error):  # raised by reading an image
                raise
            time.sleep(DEATH_NOTICE_SECONDS)
            raise RuntimeError("DataLoader worker (pid unknown) ended while it sent a batch") from error
        except RuntimeError as error:
            if (explained := _explained(error)) is None:
                raise
            raise explained from error
        try:
            yield batch
        except GeneratorExit:
            _LEFT.extend(_readings([loader]))
            raise


def _explained(error: RuntimeError) -> TrainingError | None:
    """The error that names the image which the worker was reading whose death torch reports; None for any other."""
    for read, items in (*_readings(tuple(_LOADERS)), *_LEFT):
        if (index := read.image_of(str(error))) is not None:
            return TrainingError(
                "a process that decodes images died while it read this one",
                path=str(items.name_of(index)),
                found=first_line(error),
                remedy="remove or re-encode the image; if other images fail too, use fewer processes with data.workers",
            )
    return None


def _readings(loaders: Sequence[DataLoader[Item]]) -> list[tuple[Reading, Any]]:
    """What the workers of loaders read, and the images."""
    return [(one.worker_init_fn.args[0], one.dataset) for one in loaders if isinstance(one.worker_init_fn, partial)]


@cache
def _prepare_for_workers() -> None:
    """Explain a worker's death, and let this process exit while workers live, as after an error within an epoch.

    multiprocessing ends its children by one SIGTERM, then waits for them without a limit. Workers ignore the first
    SIGTERM (`_prepare_worker`), so they would never end.
    """
    add_explanation(_explained)
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):  # else torch's handler raises an error for each worker that ends so
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _prepare_worker(now: Reading, worker: int) -> None:
    """A stop request reaches the whole process group; workers must live until the step is done and saved."""
    now.begin(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only the first SIGTERM is ignored: the parent itself ends a worker so, if need be more than once.
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))
    sys.excepthook = _print_unless_disconnected


def _print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of a worker's threads, unless the parent closed the connection while it took a batch."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
