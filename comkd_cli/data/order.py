"""The order in which the images of an epoch are seen: a function of the seed and the epoch alone."""

from __future__ import annotations

import numpy as np
import torch

from comkd_cli.data.source import ImageSet
from comkd_cli.data.transforms import stable_seed

WINDOW_RUNS = 16  # shards that are read at the same time; their images are shuffled together


def epoch_order(images: ImageSet, seed: int, epoch: int) -> np.ndarray | WindowedOrder:
    """The positions of a set's images in the order of an epoch: `order[start:stop]` is int64 (stop - start,).

    Images in shards are ordered window by window, so that a few shards are read at a time; others in any order.
    """
    if images.runs_on_disk is None:
        return _shuffled(len(images), "order", seed, epoch)
    return WindowedOrder(images.runs_on_disk, seed, epoch)


class WindowedOrder:
    """Runs of images on disk in random order, and random within each window of 16 such runs.

    starts: where each run begins, and where the last ends, int64 (runs + 1,). Keeps the windows of one slice
    at a time; a slice is found by its position alone, whatever was read before.
    """

    def __init__(self, starts: np.ndarray, seed: int, epoch: int) -> None:
        self._starts = starts
        self._seed, self._epoch = seed, epoch
        self._runs = _shuffled(len(starts) - 1, "shards", seed, epoch)
        lengths = np.diff(starts)[self._runs]
        firsts = np.arange(0, len(self._runs), WINDOW_RUNS)
        self._ends = np.cumsum(np.add.reduceat(lengths, firsts))
        self._held: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(len(self))
        if stop <= start:
            return np.empty(0, dtype=np.int64)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        numbers = range(first, last + 1)
        self._held = {n: self._held[n] if n in self._held else self._window(n) for n in numbers}
        before = int(self._ends[first - 1]) if first else 0
        return np.concatenate([self._held[n] for n in numbers])[start - before : stop - before]

    def _window(self, number: int) -> np.ndarray:
        runs = self._runs[number * WINDOW_RUNS : (number + 1) * WINDOW_RUNS]
        positions = [np.arange(self._starts[run], self._starts[run + 1]) for run in runs]
        order = _shuffled(sum(map(len, positions)), "window", self._seed, self._epoch, number)
        return np.asarray(np.concatenate(positions)[order])


def _shuffled(count: int, *seed: int | str) -> np.ndarray:
    """Every number below `count` once, int64 (count,)."""
    generator = torch.Generator().manual_seed(stable_seed(*seed))
    order: np.ndarray = torch.randperm(count, generator=generator).numpy()
    return order
