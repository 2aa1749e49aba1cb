"""A teacher that runs once per crop: its features are read from and written to a cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, repeat

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
from comkd_cli.runtime.devices import failures_explained, to_device, to_host
from comkd_cli.teachers.feature_cache import TeacherCache
from comkd_cli.teachers.loading import ReadyTeacher

BATCH_SIZE = 64
TORCH_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
FEWEST_AT_ONCE = 16
"""The teacher sees at least this many crops at once, or as many as the batch has if that is fewer. With 16 or more, the
CLIPs that were tried (ViT-B/32 and the small ones of the tests) gave each crop the same bits in any batch."""
Encoded = tuple[np.ndarray, np.ndarray, tuple[str, ...]]
"""The indices of a batch's images, their features, and a line for each unreadable image."""
IMAGES_AT_ONCE = 2**18  # images whose indices are in memory while a cache is filled


class CachedTeacher:
    """A teacher that reads cached features and computes the missing ones; without a cache it computes all of them."""

    def __init__(self, teacher: Teacher, cache: TeacherCache | None) -> None:
        self.cache = cache
        self._teacher = teacher
        self._computed = self._read = 0  # crops
        self._started = time.monotonic()
        self._clock = Clock(teacher.class_vectors.device)
        self._pending: list[tuple[int, np.ndarray, Callable[[], np.ndarray]]] = []
        self._marks: tuple[int, np.ndarray] | None = None

    def is_cached(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Which crops are cached, (len(indices),) bool; the loader then does not make the teacher's input."""
        assert self.cache is not None  # the loader has this method only with a cache
        if not ranks.on_several_machines():
            return ~self.cache.missing(view, indices)
        # A network file system shows what another machine wrote when the files are opened. So the marks are those of
        # the beginning of the epoch, in which each crop occurs once.
        if self._marks is None or self._marks[0] != view:
            self.cache.reopen()
            self._marks = view, self.cache.marks(view)
        return self.cache.marked(view, self._marks[1], indices)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """The teacher's features and logits of a batch.

        New features are rounded as the cache stores them, so that a run with an empty cache has the result of one with
        a full cache. On a GPU, or with several processes, they stay in memory until `flush` is called.
        """
        if self.cache is None:
            output: TeacherOutput = self._teacher(batch.inputs[0])
            return output
        device = self._teacher.class_vectors.device
        indices = batch.indices.numpy()
        missing = np.ones(len(indices), bool) if batch.uncached is None else batch.uncached.numpy()
        self._computed += int(missing.sum())
        self._read += int((~missing).sum())
        if missing.all():
            return self._teacher.answer(self._compute(batch, indices))
        if not missing.any():
            return self._teacher.answer(self._cached(batch.view, indices))
        features = torch.empty(len(indices), self.cache.key.dim, device=device)
        features[_indices_of(missing, device)] = self._compute(batch, indices[missing])
        features[_indices_of(~missing, device)] = self._cached(batch.view, indices[~missing])
        return self._teacher.answer(features)

    def _compute(self, batch: Batch, indices: np.ndarray) -> Tensor:
        """The features of the images in the teacher's input, rounded, float32 (len(indices), dim)."""
        assert self.cache is not None
        with self._clock:
            images = _padded(batch.inputs[0], min(len(batch), FEWEST_AT_ONCE))
            computed = self._teacher.encode(images)[: len(indices)].to(TORCH_DTYPES[self.cache.key.dtype])
        self._pending.append((batch.view, indices, to_host(computed)))
        if computed.device.type == "cpu" and ranks.world_size() == 1:
            self._write_new()  # costs nothing here: there is no device or process to wait for
        return computed.float()

    def _cached(self, view: int, indices: np.ndarray) -> Tensor:
        """Features of the cache on the teacher's device, float32 (len(indices), dim)."""
        assert self.cache is not None
        features = torch.from_numpy(self.cache.read(view, indices))
        self.cache.release()
        return to_device(features, self._teacher.class_vectors.device)

    def flush(self, epoch_ended: bool = False) -> None:
        """Write new features to the cache. All processes call it together, and the main one writes."""
        if self.cache is None:
            return
        self._write_new()
        # Steps before a checkpoint are not repeated after a kill, and other processes see only the marks in the file.
        self.cache.flush()
        if epoch_ended:
            self._marks = None

    def _write_new(self) -> None:
        assert self.cache is not None
        mine = [(view, indices, features()) for view, indices, features in self._pending]
        self._pending.clear()
        self._clock.seconds()
        _write(self.cache, [entry for of_rank in collectives.gather(mine) for entry in of_rank])

    def report_savings(self, report: Report) -> None:
        """Report how many crops came from the cache, over all processes, and the teacher's time that this saved."""
        if self.cache is None:
            return
        self.flush()
        elapsed = time.monotonic() - self._started
        computed = _record_cost(self.cache, self._clock, self._computed)
        rows = collectives.all_gather((self._read, elapsed, self.cache.damaged))
        read, elapsed, damaged = (sum(column) for column in zip(*rows, strict=True))
        _report_damaged(damaged, report)
        if not computed + read:
            return
        saved = read * (self.cache.seconds_per_crop() or 0)
        text = f", which saved about {saved:,.0f} s of the teacher's time, {saved / (saved + elapsed):.0%} of the run"
        report(Notice(f"teacher cache: {read:,} crops read{text if saved else ''}; {computed:,} computed"))


def fill_cache(
    cache: TeacherCache,
    ready: ReadyTeacher,
    images: ImageSet,
    recipe: Recipe,
    accelerator: Accelerator,
    report: Report,
) -> None:
    """Compute every feature that the cache lacks. Several processes share the crops; the main one writes.

    Raises DataError for too many unreadable images.
    """
    settings = recipe.teacher_cache
    assert settings is not None  # since the recipe has a cache
    unreadable: dict[str, None] = {}
    workers = worker_count(recipe.data)
    clock, computed = Clock(accelerator.device), 0
    with failures_explained():
        for view in range(settings.views):
            starts = range(0, len(images), IMAGES_AT_ONCE)
            total, done = sum(len(_missing(cache, view, start)) for start in starts), 0
            for start in starts:
                missing = _missing(cache, view, start)
                share = ranks.share(missing)
                batches = view_batches(
                    images,
                    ready.preprocessing,
                    Crops(recipe.augment, settings.seed),
                    view,
                    [share[i : i + BATCH_SIZE] for i in range(0, len(share), BATCH_SIZE)],
                    workers,
                )
                # Every process makes as many rounds, also if its share is a batch shorter than another's.
                rounds = math.ceil(math.ceil(len(missing) / ranks.world_size()) / BATCH_SIZE)
                inputs = islice(chain(batches, repeat(None)), rounds)
                for mine in encoded_batches(ready.teacher, inputs, accelerator, clock):
                    computed += len(mine[0])
                    of_ranks = collectives.gather(mine)
                    _write(cache, [(view, indices, features) for indices, features, _ in of_ranks])
                    for indices, _, problems in of_ranks:
                        unreadable |= dict.fromkeys(problems)
                        done += len(indices) + len(problems)
                    report(Progress(f"teacher, crop {view + 1}/{settings.views}", done, total))
            cache.flush()
            unreadable = collectives.broadcast(unreadable)
            check_unreadable(unreadable, len(images), recipe.data.unreadable_limit_percent)
    _record_cost(cache, clock, computed)
    for problem in list(unreadable)[:MOST_NAMED]:
        report(Notice(f"unreadable, skipped: {problem}"))
    _report_damaged(collectives.broadcast(cache.damaged), report)
    report(Notice(f"teacher cache: {cache.count():,} of {settings.views * len(images):,} crops cached"))


def _report_damaged(features: int, report: Report) -> None:
    if features:
        report(Notice(f"teacher cache: {features:,} cached features were damaged and were computed again"))


def _missing(cache: TeacherCache, view: int, start: int) -> list[int]:
    """The images without a feature of this view, among IMAGES_AT_ONCE from an index on, as the main process finds."""
    if not ranks.is_main():
        return collectives.broadcast([])
    indices = np.arange(start, min(start + IMAGES_AT_ONCE, cache.key.images))
    found: list[int] = indices[cache.missing(view, indices)].tolist()
    return collectives.broadcast(found)


def encoded_batches(
    teacher: Teacher, batches: Iterable[Batch | None], accelerator: Accelerator, clock: Clock
) -> Iterator[Encoded]:
    """What becomes of each batch, one batch behind: a GPU computes the next one while these features are written."""
    started: Callable[[], Encoded] | None = None
    for batch in batches:
        before, started = started, _encode(teacher, batch, accelerator, clock)
        if before is not None:
            yield before()
    if started is not None:
        yield started()


def _encode(teacher: Teacher, batch: Batch | None, accelerator: Accelerator, clock: Clock) -> Callable[[], Encoded]:
    """Start to encode a batch; the result waits for the device."""
    if batch is None or not len(batch):
        empty = np.empty((0, teacher.class_vectors.shape[1]), np.float32)
        return lambda: (np.empty(0, np.int64), empty, () if batch is None else batch.unreadable)
    with clock, accelerator.autocast():
        encoded = teacher.encode(_padded(batch.to(accelerator.device).inputs[0], FEWEST_AT_ONCE))
    features = to_host(encoded[: len(batch)])
    return lambda: (batch.indices.numpy(), features(), batch.unreadable)


def _padded(images: Tensor, rows: int) -> Tensor:
    """The images (batch, 3, size, size), with the last one repeated up to a number of rows.

    Products of a few rows round differently on a CPU. Which crops are computed together depends on what other runs have
    cached, and should not show in the features.
    """
    if len(images) >= rows:
        return images
    return torch.cat([images, images[-1:].expand(rows - len(images), *images.shape[1:])])


def _write(cache: TeacherCache, entries: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> None:
    """Write features by view and images, then mark them; drop the pages of the file that this touched from memory."""
    for view, indices, features in entries:
        cache.put(view, indices, features)
        cache.release()
    for view, indices, _ in entries:
        cache.mark(view, indices)
    if entries and ranks.on_several_machines():
        cache.flush()


def _record_cost(cache: TeacherCache, clock: Clock, computed: int) -> int:
    """Record the teacher's time for the crops that it computed; returns their number over all processes."""
    rows = collectives.all_gather((clock.seconds(), computed))
    crops = sum(row[1] for row in rows)
    if crops and ranks.is_main():
        cache.add_cost(sum(row[0] for row in rows), crops)
    return crops


class Clock:
    """Adds up the time that blocks take, on a GPU without making the CPU wait for it."""

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
        """The time so far; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


def _gpu_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _indices_of(mask: np.ndarray, device: torch.device) -> Tensor:
    """The indices where a mask is true; a mask on a GPU would be counted there, and the CPU would wait for it."""
    return to_device(torch.from_numpy(np.flatnonzero(mask)), device)
