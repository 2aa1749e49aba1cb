"""Batches of images, decoded in worker processes, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

from comkd_cli.data.batches import Batch, CropIndex, Crops, ScoringItems, TrainingItems, shared_inputs
from comkd_cli.data.order import epoch_order
from comkd_cli.data.source import ImageSet
from comkd_cli.data.workers import batches_of, can_fork, data_loader
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import TrainingError
from comkd_cli.recipe.model import Data
from comkd_cli.runtime import ranks

__all__ = [
    "Batch",
    "Crops",
    "Steps",
    "TrainingLoader",
    "check_shares",
    "scoring_batches",
    "shared_scoring_batches",
    "training_workers",
    "view_batches",
    "worker_count",
]

MOST_WORKERS = 8
CROPS_WORTH_A_PROCESS = 10_000  # of digits: three seconds of one core, where a fork takes a tenth of a second

IsCached = Callable[[int, np.ndarray], np.ndarray]
"""From a view and image indices, int64 (n,), to whether the features of each crop are cached, bool (n,)."""


@dataclass(frozen=True)
class Steps:
    """How the images of an epoch are divided into steps."""

    batch_size: int
    """Images of a step, over all processes and parts."""
    seed: int
    """Of the order."""
    parts: int = 1
    """Batches that a step consists of."""


class TrainingLoader:
    """Random crops of a set of images, epoch by epoch, from any step of any epoch.

    preprocessings: of the models that see each crop. Each process decodes its share of a step. An incomplete last step
    is dropped, unless it is the only one. Which images a step has depends on its batch size and seed alone. is_cached:
    which crops the first model has cached features of; its input is then not prepared. Closing is left to garbage
    collection, as DataLoader does it. Raises TrainingError if a step has fewer images than its shares need.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessings: Sequence[Preprocessing],
        crops: Crops,
        steps: Steps,
        workers: int,
        is_cached: IsCached | None = None,
    ) -> None:
        self.batch_size = min(steps.batch_size, len(images))
        self.image_count = len(images)
        self._parts = steps.parts
        check_shares(self.batch_size, steps.parts)
        steps = Steps(self.batch_size, steps.seed, steps.parts)
        self._sampler = _EpochBatches(images, steps, crops, is_cached)
        items = TrainingItems(images, tuple(preprocessings), crops)
        # If some features of the first model are cached, its input holds fewer images: a tensor of its own.
        shared = shared_inputs(preprocessings) if is_cached is None else tuple(range(len(preprocessings)))
        self._loader = data_loader(items, self._sampler, shared, workers, persistent=True)
        self._images = images

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch."""
        return self._sampler.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """The parts of each step of an epoch from a step on; both count from 0."""
        self._sampler.epoch, self._sampler.first_step = epoch, first_step
        batches = batches_of(self._loader)
        while parts := tuple(islice(batches, self._parts)):
            yield parts

    def name_of(self, index: int) -> str:
        """The name of an image, by its index in `Batch.indices`."""
        return self._images.keys[index]


def check_shares(batch_size: int, parts: int) -> None:
    """Raise TrainingError if a step has fewer images than processes and parts to divide them among."""
    processes = ranks.world_size()
    least = parts * max(2, processes) if parts * processes > 1 else 1
    if batch_size < least:
        raise TrainingError(
            f"too small for {processes} processes and {parts} gradient accumulation steps",
            field="batch_size",
            found=batch_size,
            allowed=f"at least {least}",
            remedy="raise batch_size, use more images, or lower accumulation_steps",
        )


def scoring_batches(images: ImageSet, preprocessing: Preprocessing, batch_size: int, workers: int) -> Iterator[Batch]:
    """Every image once, in order, as the input of one model."""
    return shared_scoring_batches(images, [preprocessing], batch_size, workers)


def shared_scoring_batches(
    images: ImageSet, preprocessings: Sequence[Preprocessing], batch_size: int, workers: int
) -> Iterator[Batch]:
    """Every image once, in order, as the input of each of several models: it is decoded once for all of them."""
    batches = [list(range(i, min(i + batch_size, len(images)))) for i in range(0, len(images), batch_size)]
    items = ScoringItems(images, preprocessings)
    yield from batches_of(data_loader(items, batches, shared_inputs(preprocessings), workers))


def view_batches(
    images: ImageSet,
    preprocessing: Preprocessing,
    crops: Crops,
    view: int,
    batches: Sequence[Sequence[int]],
    workers: int,
) -> Iterator[Batch]:
    """The crops of one view as the input of one model. batches: the positions of each batch's images."""
    items = TrainingItems(images, (preprocessing,), crops)
    indices: list[list[CropIndex]] = [[(int(index), view, True) for index in batch] for batch in batches]
    yield from batches_of(data_loader(items, indices, (0,), workers))


def worker_count(data: Data) -> int:
    """Processes to decode with: the recipe's number, or one less than the cores that this process may use."""
    if data.workers is not None:
        return data.workers
    if data.dataset == "digits":
        return 0  # the digits are in memory: starting a process costs more than it saves
    return max(0, min(MOST_WORKERS, ranks.usable_cores() // ranks.per_machine() - 1))


def training_workers(data: Data, crops: int) -> int:
    """As `worker_count`, but a long run on `digits` has a process that prepares its crops. crops: of all epochs."""
    if data.workers is None and data.dataset == "digits" and crops >= CROPS_WORTH_A_PROCESS and can_fork():
        return min(1, ranks.usable_cores() // ranks.per_machine() - 1)
    return worker_count(data)


class _EpochBatches(Sampler[list[CropIndex]]):
    """This process's share of each part of each step of an epoch."""

    def __init__(self, images: ImageSet, steps: Steps, crops: Crops, is_cached: IsCached | None) -> None:
        self._images = images
        self._steps = steps
        self._crops = crops
        self._is_cached = is_cached
        self.steps_per_epoch = len(images) // steps.batch_size
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self._steps.parts

    def __iter__(self) -> Iterator[list[CropIndex]]:
        order = epoch_order(self._images, self._steps.seed, self.epoch)
        view, size = self._crops.view_of(self.epoch), self._steps.batch_size
        for step in range(self.first_step, self.steps_per_epoch):
            for part in np.array_split(order[step * size : (step + 1) * size], self._steps.parts):
                mine = np.array_split(part, ranks.world_size())[ranks.rank()]
                cached = np.zeros(len(mine), dtype=bool) if self._is_cached is None else self._is_cached(view, mine)
                yield [(int(index), view, not is_cached) for index, is_cached in zip(mine, cached, strict=True)]
