"""A teacher that is asked once for each crop, where a cache keeps what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator

from comkd_cli.data.loaders import Batch, view_batches, worker_count
from comkd_cli.data.source import ImageSet
from comkd_cli.devices import failures_explained
from comkd_cli.method.teacher import Teacher, TeacherOutput
from comkd_cli.progress import Notice, Progress, Report
from comkd_cli.recipe import Recipe
from comkd_cli.teacher_cache import TeacherCache
from comkd_cli.teachers import ReadyTeacher
from comkd_cli.training import MOST_NAMED, check_unreadable

BATCH_SIZE = 64
FILLED_AT_ONCE = 2**18  # images whose positions are in memory while a cache is filled


class AskedTeacher:
    """A teacher that answers from its cache what it was asked before; without a cache it looks at every crop."""

    def __init__(self, teacher: Teacher, cache: TeacherCache | None) -> None:
        self.cache = cache
        self._teacher = teacher
        self._computed = self._read = 0
        self._seconds = 0.0

    def known(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Which crops it need not see, (len(indices),) bool; for the loader."""
        assert self.cache is not None  # it is asked only where there is one
        return ~self.cache.missing(view, indices)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """What the teacher says of a batch.

        With a cache always by the features that are kept, so that a run is the same whether the cache was full
        or empty.
        """
        if self.cache is None:
            output: TeacherOutput = self._teacher(batch.inputs[0])
            return output
        indices = batch.indices.numpy()
        fresh = indices if batch.asked is None else indices[batch.asked.numpy()]
        if len(fresh):
            started = time.monotonic()
            features = self._teacher.encode(batch.inputs[0]).cpu().numpy()
            self._seconds += time.monotonic() - started
            self.cache.write(batch.view, fresh, features)
        self._computed += len(fresh)
        self._read += len(indices) - len(fresh)
        kept = torch.from_numpy(self.cache.read(batch.view, indices))
        return self._teacher.answer(kept.to(self._teacher.class_vectors.device, non_blocking=True))

    def tell(self, report: Report) -> None:
        """What the cache saved, from the teacher's time on the crops that it had to see."""
        if self.cache is None or not self._computed + self._read:
            return
        self.cache.flush()
        saved = ""
        if self._computed and self._read:
            saved = f", about {self._read * self._seconds / self._computed:,.0f} s of the teacher's time"
        report(
            Notice(f"teacher cache: {self._read:,} crops came from it{saved}; {self._computed:,} went to the teacher")
        )


def fill_cache(
    cache: TeacherCache,
    ready: ReadyTeacher,
    images: ImageSet,
    recipe: Recipe,
    accelerator: Accelerator,
    report: Report,
) -> None:
    """Ask the teacher for every crop that the cache lacks; what is there already is not asked again."""
    settings = recipe.teacher_cache
    assert settings is not None  # a recipe with a cache has settings for it
    unreadable: dict[str, None] = {}
    workers = worker_count(recipe.data)
    with failures_explained():
        for view in range(settings.views):
            total, done = sum(len(part) for part in _missing(cache, view, len(images))), 0
            for part in _missing(cache, view, len(images)):
                batches = view_batches(
                    images, ready.preprocessing, recipe.augment, settings.seed, view, part, BATCH_SIZE, workers
                )
                for batch in batches:
                    if len(batch):
                        with accelerator.autocast():
                            features = ready.teacher.encode(batch.to(accelerator.device).inputs[0])
                        cache.write(view, batch.indices.numpy(), features.cpu().numpy())
                    done += len(batch) + len(batch.unreadable)
                    unreadable |= dict.fromkeys(batch.unreadable)
                    report(Progress(f"teacher, crop {view + 1}/{settings.views}", done, total))
            cache.flush()
            check_unreadable(list(unreadable), len(images), recipe.data.unreadable_limit_percent)
    for problem in list(unreadable)[:MOST_NAMED]:
        report(Notice(f"unreadable, left out: {problem}"))
    report(Notice(f"teacher cache: {cache.count():,} of {settings.views * len(images):,} crops are there"))


def _missing(cache: TeacherCache, view: int, images: int) -> Iterator[list[int]]:
    """The images that lack a feature of a view, some at a time."""
    for start in range(0, images, FILLED_AT_ONCE):
        indices = np.arange(start, min(start + FILLED_AT_ONCE, images))
        if missing := indices[cache.missing(view, indices)].tolist():
            yield missing
