"""A teacher that is asked once for each crop, where a cache keeps what it says."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from comkd_cli.data.loaders import Batch, Crops, view_batches, worker_count
from comkd_cli.data.source import ImageSet
from comkd_cli.data.unreadable import MOST_NAMED, check_unreadable
from comkd_cli.events import Notice, Progress, Report
from comkd_cli.method.teacher import Teacher, TeacherOutput
from comkd_cli.recipe import Recipe
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.devices import failures_explained, to_device
from comkd_cli.teachers.feature_cache import TeacherCache
from comkd_cli.teachers.loading import ReadyTeacher

BATCH_SIZE = 64
TORCH_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
FILLED_AT_ONCE = 2**18  # images whose positions are in memory while a cache is filled


class CachedTeacher:
    """A teacher that answers from its cache what it was asked before; without a cache it looks at every crop."""

    def __init__(self, teacher: Teacher, cache: TeacherCache | None) -> None:
        self.cache = cache
        self._teacher = teacher
        self._computed = self._read = 0
        self._started = time.monotonic()
        self._clock = _Clock(teacher.class_vectors.device)
        self._unkept: list[tuple[int, np.ndarray, Tensor]] = []
        self._marks: tuple[int, np.ndarray] | None = None

    def known(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Which crops it need not see, (len(indices),) bool; for the loader."""
        assert self.cache is not None  # it is asked only where there is one
        if not ranks.on_several_machines():
            return ~self.cache.missing(view, indices)
        # A shared folder shows this machine what another wrote when it opens the files. So what counts is what was
        # there when the epoch began: in an epoch each crop comes up once.
        if self._marks is None or self._marks[0] != view:
            self.cache.reopen()
            self._marks = view, self.cache.marks(view)
        return self.cache.marked(self._marks[1], indices)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """What the teacher says of a batch.

        With a cache always by features as they are kept, so that a run is the same whether the cache was full
        or empty. New ones stay on a GPU, or with one of several processes, until `keep` is called.
        """
        if self.cache is None:
            output: TeacherOutput = self._teacher(batch.inputs[0])
            return output
        device = self._teacher.class_vectors.device
        indices = batch.indices.numpy()
        asked = np.ones(len(indices), bool) if batch.uncached is None else batch.uncached.numpy()
        features = torch.empty(len(indices), self.cache.key.dim, device=device)
        if asked.any():
            with self._clock:
                fresh = self._teacher.encode(batch.inputs[0]).to(TORCH_DTYPES[self.cache.key.dtype])
            self._unkept.append((batch.view, indices[asked], fresh))
            features[_places(asked, device)] = fresh.float()
            if device.type == "cpu" and ranks.world_size() == 1:
                self.keep()  # there is nobody to wait for
        if not asked.all():
            kept = torch.from_numpy(self.cache.read(batch.view, indices[~asked]))
            self.cache.release()
            features[_places(~asked, device)] = to_device(kept, device)
        self._computed += int(asked.sum())
        self._read += int((~asked).sum())
        return self._teacher.answer(features)

    def keep(self, end_of_epoch: bool = False) -> None:
        """Bring new features to the cache. Each process must call it; the main one writes."""
        if self.cache is None:
            return
        mine = [(view, indices, features.cpu().numpy()) for view, indices, features in self._unkept]
        self._unkept.clear()
        self._clock.seconds()
        _write(self.cache, [entry for share in collectives.gather(mine) for entry in share])
        if end_of_epoch:
            self._marks = None

    def tell(self, report: Report) -> None:
        """What the cache saved, over all processes: the crops that came from it, at what the teacher takes for one."""
        if self.cache is None:
            return
        self.keep()
        self.cache.flush()
        elapsed = time.monotonic() - self._started
        computed = _tell_cost(self.cache, self._clock, self._computed)
        everywhere = collectives.all_gather((self._read, elapsed))
        read, elapsed = sum(row[0] for row in everywhere), sum(row[1] for row in everywhere)
        if not computed + read:
            return
        saved = read * (self.cache.seconds_per_crop() or 0)
        told = f", which saved about {saved:,.0f} s of the teacher's time, {saved / (saved + elapsed):.0%} of the run"
        report(
            Notice(
                f"teacher cache: {read:,} crops came from it{told if saved else ''}; {computed:,} went to the teacher"
            )
        )


def fill_cache(
    cache: TeacherCache,
    ready: ReadyTeacher,
    images: ImageSet,
    recipe: Recipe,
    accelerator: Accelerator,
    report: Report,
) -> None:
    """Ask the teacher for every crop that the cache lacks; what is there already is not asked again.

    Several processes share the crops out; the main one writes.
    """
    settings = recipe.teacher_cache
    assert settings is not None  # a recipe with a cache has settings for it
    unreadable: dict[str, None] = {}
    workers = worker_count(recipe.data)
    clock, asked = _Clock(accelerator.device), 0
    with failures_explained():
        for view in range(settings.views):
            starts = range(0, len(images), FILLED_AT_ONCE)
            total, done = collectives.broadcast(sum(len(_missing(cache, view, start)) for start in starts)), 0
            for start in starts:
                wanted = collectives.broadcast(_missing(cache, view, start))
                mine = ranks.share(wanted)
                batches = view_batches(
                    images,
                    ready.preprocessing,
                    Crops(recipe.augment, settings.seed),
                    view,
                    [mine[i : i + BATCH_SIZE] for i in range(0, len(mine), BATCH_SIZE)],
                    workers,
                )
                # As many rounds for every process, though one's share may be a batch shorter than another's.
                for _ in range(0, math.ceil(len(wanted) / ranks.world_size()), BATCH_SIZE):
                    batch = next(batches, None)
                    answer = _answered(ready.teacher, batch, accelerator, clock)
                    asked += len(answer[0])
                    answers = collectives.gather(answer)
                    _write(cache, [(view, indices, features) for indices, features, _ in answers])
                    for indices, _, problems in answers:
                        unreadable |= dict.fromkeys(problems)
                        done += len(indices) + len(problems)
                    report(Progress(f"teacher, crop {view + 1}/{settings.views}", done, total))
            cache.flush()
            unreadable = collectives.broadcast(unreadable)
            check_unreadable(unreadable, len(images), recipe.data.unreadable_limit_percent)
    _tell_cost(cache, clock, asked)
    for problem in list(unreadable)[:MOST_NAMED]:
        report(Notice(f"unreadable, left out: {problem}"))
    report(Notice(f"teacher cache: {cache.count():,} of {settings.views * len(images):,} crops are there"))


def _missing(cache: TeacherCache, view: int, start: int) -> list[int]:
    """The images that lack a feature of a view, of FILLED_AT_ONCE from a position on."""
    indices = np.arange(start, min(start + FILLED_AT_ONCE, cache.key.images))
    found: list[int] = indices[cache.missing(view, indices)].tolist()
    return found


def _answered(
    teacher: Teacher, batch: Batch | None, accelerator: Accelerator, clock: _Clock
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """A batch's positions and features, and what could not be read of it."""
    if batch is None or not len(batch):
        nothing = np.empty((0, teacher.class_vectors.shape[1]), np.float32)
        return np.empty(0, np.int64), nothing, () if batch is None else batch.unreadable
    with clock, accelerator.autocast():
        features = teacher.encode(batch.to(accelerator.device).inputs[0])
    return batch.indices.numpy(), features.cpu().numpy(), batch.unreadable


def _write(cache: TeacherCache, entries: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> None:
    """Write features by view and images, and let go of the memory that they took: each, a page of the file."""
    for view, indices, features in entries:
        cache.put(view, indices, features)
        cache.release()
    if entries and ranks.on_several_machines():
        cache.flush()  # so that no machine sees a mark before its feature
    for view, indices, _ in entries:
        cache.mark(view, indices)


def _tell_cost(cache: TeacherCache, clock: _Clock, asked: int) -> int:
    """Tell the cache what the teacher took for the crops that it was asked; their number over all processes."""
    everywhere = collectives.all_gather((clock.seconds(), asked))
    crops = sum(row[1] for row in everywhere)
    if crops and ranks.is_main():
        cache.add_cost(sum(row[0] for row in everywhere), crops)
    return crops


class _Clock:
    """Adds up the time that blocks take, on a GPU without making it wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = 0.0

    def __enter__(self) -> None:
        if self._on_gpu:
            self._events.append((_gpu_event(), _gpu_event()))
            self._events[-1][0].record()
        else:
            self._started = time.monotonic()

    def __exit__(self, *_error: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.monotonic() - self._started

    def seconds(self) -> float:
        """The time so far; it waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


def _gpu_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _places(chosen: np.ndarray, device: torch.device) -> Tensor:
    """The positions of what is chosen; a mask on a GPU would have to be counted there, and waited for."""
    return to_device(torch.from_numpy(np.flatnonzero(chosen)), device)
