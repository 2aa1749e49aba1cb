from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from comkd_cli.data.order import WINDOW_RUNS, WindowedOrder, epoch_order
from comkd_cli.data.source import ImageSet


def black(_key: str) -> Image.Image:
    return Image.new("RGB", (2, 2))


@dataclass(frozen=True)
class InRuns(ImageSet):
    """Images that lie on disk in runs of these lengths."""

    lengths: Sequence[int] = ()

    @property
    def runs_on_disk(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])


def in_runs(lengths: Sequence[int]) -> InRuns:
    return InRuns(tuple(map(str, range(sum(lengths)))), None, black, lengths=lengths)


LENGTHS = [1 + (7 * n) % 11 for n in range(3 * WINDOW_RUNS + 5)]  # 53 runs, in 4 windows


def test_images_that_are_no_shards_come_as_they_always_did() -> None:
    images = ImageSet(tuple(map(str, range(20))), None, black)
    # Written down before there were shards: a run must resume with the order that it began with.
    expected = [16, 10, 12, 18, 9, 5, 4, 19, 14, 0, 15, 1, 3, 17, 7, 11, 2, 13, 8, 6]
    assert epoch_order(images, 7, 3)[:].tolist() == expected
    assert epoch_order(images, 7, 3)[4:7].tolist() == expected[4:7]


@pytest.mark.parametrize("lengths", [LENGTHS, [5], [1, 1, 1], [3] * WINDOW_RUNS, [3] * (WINDOW_RUNS + 1)])
def test_every_image_comes_once_in_an_epoch(lengths: list[int]) -> None:
    order = epoch_order(in_runs(lengths), 1, 0)
    assert isinstance(order, WindowedOrder)
    assert len(order) == sum(lengths)
    assert sorted(order[:].tolist()) == list(range(sum(lengths)))


def test_slices_in_any_order_are_those_of_the_whole() -> None:
    images = in_runs(LENGTHS)
    whole = epoch_order(images, 1, 2)[:]
    total = len(whole)
    assert whole.dtype == np.int64
    for size in (1, 7, total // 2, total, 2 * total):
        order = epoch_order(images, 1, 2)
        for start in [*range(0, total, size)][::-1]:
            assert np.array_equal(order[start : start + size], whole[start : start + size])
    assert len(epoch_order(images, 1, 2)[total : total + 5]) == 0


def test_a_window_holds_whole_runs_and_few_of_them() -> None:
    images = in_runs(LENGTHS)
    whole = epoch_order(images, 1, 0)[:]
    run_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    seen: set[int] = set()
    start = 0
    while start < len(whole):
        run_count, stop, runs = 0, start, set[int]()
        while stop < len(whole) and (run_of[whole[stop]] in runs or len(runs) < WINDOW_RUNS):
            runs.add(int(run_of[whole[stop]]))
            stop += 1
        run_count = sum(LENGTHS[run] for run in runs)
        assert run_count == stop - start  # nothing of another window stands between
        assert not runs & seen
        seen |= runs
        start = stop
    assert len(seen) == len(LENGTHS)


def test_images_are_shuffled_within_a_window_and_not_run_by_run() -> None:
    whole = epoch_order(in_runs([100] * WINDOW_RUNS), 1, 0)[:]
    runs_at_the_start = len(set((whole[:100] // 100).tolist()))
    assert runs_at_the_start > WINDOW_RUNS / 2


def test_order_and_windows_depend_on_the_seed_and_the_epoch_alone() -> None:
    images = in_runs(LENGTHS)
    orders = {(seed, epoch): epoch_order(images, seed, epoch)[:].tolist() for seed in (1, 2) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(images, 2, 1)[:].tolist() == orders[2, 1]
    # Not only within the same windows.
    first_window = sum(sorted(LENGTHS)[:WINDOW_RUNS])
    assert set(orders[1, 0][:first_window]) != set(orders[1, 1][:first_window])


def test_only_the_windows_of_a_slice_are_held() -> None:
    order = epoch_order(in_runs(LENGTHS), 1, 0)
    assert isinstance(order, WindowedOrder)
    for start in range(0, len(order), 5):
        order[start : start + 5]
        assert len(order._held) <= 2
