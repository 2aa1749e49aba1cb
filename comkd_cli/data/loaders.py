"""Batches of images, decoded in worker processes, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import atexit
import multiprocessing.util  # its handler at exit must be registered before ours: the last one runs first
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from comkd_cli.data.order import epoch_order
from comkd_cli.data.source import ImageSet
from comkd_cli.data.transforms import scoring_input, stable_seed, training_inputs
from comkd_cli.edge.images import Preprocessing, UnreadableImage
from comkd_cli.errors import TrainingError
from comkd_cli.recipe.model import Augment, Data
from comkd_cli.runtime import ranks

MOST_WORKERS = 8
DEATH_IS_TOLD_SECONDS = 2


@dataclass(frozen=True)
class Batch:
    """Images that could be read, and the names of those that could not."""

    inputs: tuple[Tensor, ...]
    """For each model, its input (batch, 3, size, size); models with one pre-processing share the tensor."""
    labels: Tensor | None
    """(batch,) int64, or None where the images are unlabelled."""
    indices: Tensor
    """(batch,) int64, the images' positions in their set."""
    unreadable: tuple[str, ...] = ()
    """A line for each image that is missing from the batch, naming it and the reason."""
    view: int = 0
    """Which crop of its images this is."""
    asked: Tensor | None = None
    """(batch,) bool: the images that stand in the first model's input, where it is not asked about all."""

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies to CUDA run beside other work, from pinned memory."""
        beside = device.type == "cuda"
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=beside))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; DataLoader calls this by name."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With inputs and labels changed; an input that models share is changed once and stays shared."""
        changed = {id(tensor): change(tensor) for tensor in {id(t): t for t in self.inputs}.values()}
        labels = None if self.labels is None else change(self.labels)
        return replace(self, inputs=tuple(changed[id(tensor)] for tensor in self.inputs), labels=labels)


class TrainingLoader:
    """Random crops of a set of images, epoch by epoch, from any step of any epoch.

    preprocessings: of the models that look at each crop. batch_size: images of a step, over all processes and
    parts; each process decodes its share. parts: batches that a step is made of. An incomplete last step is
    dropped, unless it is the only one. Which images a step has depends on none of these but batch_size. views:
    crops of an image that there are, epoch e seeing crop e mod views; None: a new one every epoch. crop_seed: of
    the crops; None takes the seed, which the order depends on. known: whether the first model's answer to crops of
    a view is known already, (indices,) to bool; its input is then not made. Closing is left to garbage collection,
    as DataLoader does it. Raises TrainingError where a step has fewer images than processes and parts to give them to.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessings: Sequence[Preprocessing],
        augment: Augment,
        batch_size: int,
        seed: int,
        workers: int,
        views: int | None = None,
        crop_seed: int | None = None,
        known: Callable[[int, np.ndarray], np.ndarray] | None = None,
        parts: int = 1,
    ) -> None:
        self.batch_size = min(batch_size, len(images))
        self.image_count = len(images)
        self._parts = parts
        check_shares(self.batch_size, parts)
        self._sampler = _EpochBatches(images, self.batch_size, parts, seed, views, known)
        items = _TrainingItems(images, tuple(preprocessings), augment, seed if crop_seed is None else crop_seed)
        # Where the first model is not asked about every image, its input is a tensor of its own.
        shared = _sharing(preprocessings) if known is None else tuple(range(len(preprocessings)))
        self._loader = _data_loader(items, self._sampler, shared, workers, persistent=True)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self._sampler.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """The parts of each step of an epoch from a step on; both count from 0."""
        self._sampler.epoch, self._sampler.first_step = epoch, first_step
        batches = _batches(self._loader)
        while parts := tuple(islice(batches, self._parts)):
            yield parts


def check_shares(batch_size: int, parts: int) -> None:
    """Raise TrainingError where a step has fewer images than processes and parts to give them to."""
    least = parts * max(2, ranks.world_size()) if parts * ranks.world_size() > 1 else 1
    if batch_size < least:
        raise TrainingError(
            f"a step of {batch_size} images can't be shared by {ranks.world_size()} processes in {parts} parts; with "
            f"these, batch_size must be {least} at least, and so must the images be"
        )


def scoring_batches(images: ImageSet, preprocessing: Preprocessing, batch_size: int, workers: int) -> Iterator[Batch]:
    """Every image once, in order, as the input of one model."""
    batches = [list(range(i, min(i + batch_size, len(images)))) for i in range(0, len(images), batch_size)]
    items = _ScoringItems(images, preprocessing)
    yield from _batches(_data_loader(items, batches, (0,), workers, persistent=False))


def view_batches(
    images: ImageSet,
    preprocessing: Preprocessing,
    augment: Augment,
    crop_seed: int,
    view: int,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
) -> Iterator[Batch]:
    """One crop of each of these images, the `view`-th, in order, as the input of one model."""
    items = _TrainingItems(images, (preprocessing,), augment, crop_seed)
    positions = [(int(index), view, True) for index in indices]
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    yield from _batches(_data_loader(items, batches, (0,), workers, persistent=False))


def worker_count(data: Data) -> int:
    """Processes to decode with: what the recipe says, or one less than the cores this process may use."""
    if data.workers is not None:
        return data.workers
    if data.dataset == "digits":
        return 0  # the digits are in memory: starting a process costs more than it saves
    return max(0, min(MOST_WORKERS, ranks.usable_cores() // ranks.per_machine() - 1))


@dataclass(frozen=True)
class _Item:
    index: int
    inputs: tuple[Tensor | None, ...] | None
    """None for an image that can't be read; within, for a model that is not asked."""
    label: int | None
    problem: str = ""
    view: int = 0


class _TrainingItems(Dataset[_Item]):
    def __init__(
        self, images: ImageSet, preprocessings: tuple[Preprocessing, ...], augment: Augment, seed: int
    ) -> None:
        self._images = images
        self._preprocessings = preprocessings
        self._augment = augment
        self._seed = seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: tuple[int, int, bool]) -> _Item:
        index, view, ask = position
        crop_seed = stable_seed("crop", self._seed, self._images.keys[index], view)
        asked = self._preprocessings if ask else self._preprocessings[1:]

        def prepare(image: Image) -> tuple[Tensor | None, ...]:
            inputs = training_inputs(image, asked, self._augment, crop_seed)
            return tuple(inputs) if ask else (None, *inputs)

        return replace(_item(self._images, index, prepare), view=view)


class _ScoringItems(Dataset[_Item]):
    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self._images = images
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> _Item:
        return _item(self._images, index, lambda image: (scoring_input(image, self._preprocessing),))


def _item(images: ImageSet, index: int, prepare: Callable[[Image], tuple[Tensor | None, ...]]) -> _Item:
    label = None if images.labels is None else images.labels[index]
    try:
        return _Item(index, prepare(images.open(index)), label)
    except UnreadableImage as error:
        return _Item(index, None, label, str(error))
    except MemoryError:
        return _Item(index, None, label, f"{images.keys[index]}: there is not enough memory to prepare it")


class _EpochBatches(Sampler[list[tuple[int, int, bool]]]):
    """Lists of (image, view, whether to ask the first model), this process's share of each part of each step."""

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        parts: int,
        seed: int,
        views: int | None,
        known: Callable[[int, np.ndarray], np.ndarray] | None,
    ) -> None:
        self._images = images
        self._batch_size = batch_size
        self._parts = parts
        self._seed = seed
        self._views = views
        self._known = known
        self.steps = len(images) // batch_size
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self._parts

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        order = epoch_order(self._images, self._seed, self.epoch)
        view = self.epoch if self._views is None else self.epoch % self._views
        for step in range(self.first_step, self.steps):
            chosen = order[step * self._batch_size : (step + 1) * self._batch_size]
            for part in np.array_split(chosen, self._parts):
                mine = np.array_split(part, ranks.world_size())[ranks.rank()]
                known = np.zeros(len(mine), dtype=bool) if self._known is None else self._known(view, mine)
                yield [(int(index), view, not is_known) for index, is_known in zip(mine, known, strict=True)]


def _sharing(preprocessings: Sequence[Preprocessing]) -> tuple[int, ...]:
    """For each model, the first model with the same pre-processing: its tensor serves both."""
    return tuple(list(preprocessings).index(preprocessing) for preprocessing in preprocessings)


def _collate(items: list[_Item], sharing: tuple[int, ...]) -> Batch:
    readable = [item.inputs for item in items if item.inputs is not None]

    def stacked(model: int) -> Tensor:
        given = [tensor for inputs in readable if (tensor := inputs[model]) is not None]
        # In a worker it stacks where the main process can read, and spares the copy that torch.stack would need.
        return default_collate(given) if given else torch.empty(0)

    made = {model: stacked(model) for model in set(sharing)}
    asked = torch.tensor([inputs[0] is not None for inputs in readable], dtype=torch.bool)
    labels = [item.label for item in items if item.inputs is not None]
    return Batch(
        inputs=tuple(made[model] for model in sharing),
        labels=None if items[0].label is None else torch.tensor(labels, dtype=torch.int64),
        indices=torch.tensor([item.index for item in items if item.inputs is not None], dtype=torch.int64),
        unreadable=tuple(item.problem for item in items if item.inputs is None),
        view=items[0].view,
        asked=None if bool(asked.all()) else asked,
    )


def _data_loader(
    items: Dataset[_Item],
    batches: Sampler[list[tuple[int, int, bool]]] | list[list[tuple[int, int, bool]]] | list[list[int]],
    sharing: tuple[int, ...],
    workers: int,
    persistent: bool,
) -> DataLoader[_Item]:
    if workers:
        _end_workers_at_exit()
    return DataLoader(
        items,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, sharing=sharing),
        worker_init_fn=_prepare_worker,
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a seed each epoch; from the global generator that draw would make a resumed
        # run differ from an uninterrupted one.
        generator=torch.Generator(),
    )


def _batches(loader: DataLoader[_Item]) -> Iterator[Batch]:
    """The batches of a loader. Raises RuntimeError where a worker dies, also in the middle of a batch that it sends.

    torch raises such an error by itself, with the cause, as soon as the system tells it of the death. Where the broken
    connection is met before that, the error is waited for.
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
            time.sleep(DEATH_IS_TOLD_SECONDS)
            raise RuntimeError("DataLoader worker (pid unknown) ended while it sent a batch") from error
        yield batch


@cache
def _end_workers_at_exit() -> None:
    """Make sure that this process can exit while workers live, as after an error in the middle of an epoch.

    multiprocessing ends its children by one SIGTERM, then waits for them without a limit. Workers ignore the first
    SIGTERM (`_prepare_worker`), so they would never end.
    """
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):  # else torch's handler raises an error for each worker that ends so
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _prepare_worker(_worker: int) -> None:
    """A stop that was asked for reaches the whole process group; workers must live until the step is done and saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Of SIGTERM one alone is let pass: the parent itself ends a worker so, if need be more than once.
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))
    sys.excepthook = _print_unless_disconnected


def _print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of a worker's threads, unless the parent stopped in the middle of taking a batch."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
