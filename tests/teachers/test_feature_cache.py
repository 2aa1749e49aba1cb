import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comkd_cli.errors import CheckpointError
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache
from tests import warm

KEY = CacheKey("a" * 64, images=10, dim=3, views=4, dtype="fp32")


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    """Random features of unit length."""
    features = np.random.default_rng(seed).normal(size=(*shape, KEY.dim)).astype(np.float32)
    return np.asarray(features / np.linalg.norm(features, axis=-1, keepdims=True))


def write(cache: TeacherCache, view: int, indices: np.ndarray, features: np.ndarray) -> None:
    cache.put(view, indices, features)
    cache.mark(view, indices)


def test_features_are_read_back_also_when_the_cache_is_opened_again(tmp_path: Path) -> None:
    features = unit(3)
    cache = TeacherCache(tmp_path, KEY)
    assert cache.missing(2, np.array([7, 1, 4])).all()
    write(cache, 2, np.array([7, 1, 4]), features)
    cache.flush()
    again = TeacherCache(tmp_path, KEY)
    assert np.array_equal(again.read(2, np.array([4, 7])), features[[2, 0]])
    assert again.missing(2, np.arange(10)).tolist() == [True, False, True, True, False, True, True, False, True, True]
    assert again.missing(1, np.arange(10)).all()
    assert again.count() == 3


def test_rows_map_images_to_their_features(tmp_path: Path) -> None:
    features = unit(10)
    rows = np.random.default_rng(1).permutation(10)
    cache = TeacherCache(tmp_path, KEY, rows)
    write(cache, 1, np.arange(4), features[:4])
    assert cache.missing(1, np.array([0, 5, 3])).tolist() == [False, True, False]
    write(cache, 1, np.arange(4, 10), features[4:])
    assert np.array_equal(cache.read(1, np.array([7, 2])), features[[7, 2]])
    turned = TeacherCache(tmp_path, KEY, rows[::-1])  # the same images in another order
    assert np.array_equal(turned.read(1, np.arange(10)), features[::-1])


def test_half_precision_rounds_to_the_nearest(tmp_path: Path) -> None:
    value = np.array([[0.1, -0.033333, 0.7]], dtype=np.float32)
    cache = TeacherCache(tmp_path, replace(KEY, dtype="fp16"))
    write(cache, 0, np.array([0]), value)
    assert np.array_equal(cache.read(0, np.array([0])), value.astype(np.float16).astype(np.float32))


def test_the_size_of_a_key_is_that_on_disk(tmp_path: Path) -> None:
    for key in (KEY, replace(KEY, identity="b" * 64, dtype="fp16")):
        cache = TeacherCache(tmp_path, key)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.bin")) == key.size_bytes


def test_each_key_has_a_directory_of_its_own(tmp_path: Path) -> None:
    assert TeacherCache(tmp_path, KEY).folder != TeacherCache(tmp_path, replace(KEY, identity="b" * 64)).folder


def test_another_cache_in_its_directory_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, KEY)
    remedy = f"delete {cache.folder} to rebuild the cache"
    with pytest.raises(CheckpointError) as caught:
        TeacherCache(tmp_path, replace(KEY, views=5))
    assert (caught.value.path, caught.value.remedy) == (cache.folder / "cache.json", remedy)
    with (cache.folder / "features.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError) as caught:
        TeacherCache(tmp_path, KEY)
    assert caught.value.path == cache.folder / "features.bin"
    assert (caught.value.found, caught.value.allowed, caught.value.remedy) == (481, [480], remedy)
    (cache.folder / "cache.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        TeacherCache(tmp_path, KEY)
    assert (caught.value.path, caught.value.remedy) == (cache.folder / "cache.json", remedy)


def test_marks_without_features_are_no_cache(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, KEY)
    write(cache, 0, np.arange(10), np.ones((10, 3)))
    cache.flush()
    (cache.folder / "features.bin").unlink()
    with pytest.raises(CheckpointError) as caught:
        TeacherCache(tmp_path, KEY)
    assert (caught.value.path, caught.value.found) == (cache.folder / "features.bin", 0)


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        TeacherCache(tmp_path, KEY)
    assert "teacher_cache.views" in str(caught.value.remedy)


def _fill(folder: Path, start: int) -> None:
    cache = TeacherCache(folder, KEY)
    for view in range(4):
        for index in range(start, 10, 2):
            write(cache, view, np.array([index]), np.full((1, 3), 10 * view + index, np.float32))
    cache.flush()


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    processes = [warm.context().Process(target=_fill, args=(tmp_path, start)) for start in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = TeacherCache(tmp_path, KEY)
    assert cache.count() == 40
    assert cache.read(3, np.array([9, 0])).tolist() == [[39] * 3, [30] * 3]


def test_the_teachers_time_per_crop_is_averaged_over_all_runs_that_filled_the_cache(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, KEY)
    assert cache.seconds_per_crop() is None
    write(cache, 0, np.arange(10), np.zeros((10, 3)))
    cache.add_cost(20.0, 10)
    assert TeacherCache(tmp_path, KEY).seconds_per_crop() == 2.0
    write(cache, 1, np.arange(5), np.zeros((5, 3)))
    cache.add_cost(40.0, 5)  # a slower machine
    assert TeacherCache(tmp_path, KEY).seconds_per_crop() == 4.0  # 60 s for 15 crops


@pytest.mark.parametrize("content", ["", "{}", '{"seconds": 1, "crops": 0}', "[1]"])
def test_a_cost_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    cache = TeacherCache(tmp_path, KEY)
    (cache.folder / "cost.json").write_text(content)
    assert cache.seconds_per_crop() is None
    cache.add_cost(3.0, 1)
    assert cache.seconds_per_crop() == 3.0


class Disk(mmap.mmap):
    """A mapped file that remembers what was on the disk for certain: its content when it was flushed last."""

    durable = b""

    def flush(self, *arguments: int) -> None:  # type: ignore[override]
        super().flush(*arguments)
        self.durable = self[:]


PAGE = 4096


def after_power_loss(before: bytes, now: bytes, written: Callable[[], bool]) -> bytes:
    """What a disk holds: of each page what was flushed, or what was written since, as the system came to it."""
    pages = [(now if written() else before)[start : start + PAGE] for start in range(0, len(now), PAGE)]
    return b"".join(pages)


@pytest.mark.parametrize("seed", range(10))
def test_a_mark_that_outlives_a_loss_of_power_has_its_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """At a random moment the power goes; the marks of the disk are all those written, its features the fewest."""
    key = replace(KEY, images=500, dim=64, views=2)
    random = np.random.default_rng(seed)
    features = random.normal(size=(2, 500, 64)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    monkeypatch.setattr("comkd_cli.teachers.feature_cache.mmap.mmap", Disk)
    monkeypatch.setattr("comkd_cli.teachers.feature_cache.SYNC_CROPS", int(random.integers(1, 300)))
    cache = TeacherCache(tmp_path / "running", key)
    for disk in cache._maps:
        disk.durable = bytes(len(disk))
    for _ in range(int(random.integers(1, 60))):
        view, chosen = int(random.integers(2)), random.choice(500, int(random.integers(1, 40)), replace=False)
        write(cache, view, chosen, features[view, chosen])
        assert not cache.missing(view, chosen).any()
    chance = random.choice([0.0, 0.5])
    on_disk = [
        after_power_loss(cache._maps[0].durable, cache._maps[0][:], lambda: random.random() < chance),
        after_power_loss(cache._maps[1].durable, cache._maps[1][:], lambda: True),
    ]
    monkeypatch.undo()
    after = TeacherCache(tmp_path / "after", key)
    for name, content in zip(("features.bin", "there.bin"), on_disk, strict=True):
        (after.folder / name).write_bytes(content)
    after.reopen()
    for view in range(2):
        there = np.flatnonzero(~after.missing(view, np.arange(500)))
        assert np.array_equal(after.read(view, there), features[view, there])
    assert after.damaged == 0


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_features_of_lost_pages_are_missing(tmp_path: Path, dtype: str) -> None:
    """Pages of zeros, as a file system leaves them whose journal has the size of a file alone."""
    key = replace(KEY, images=500, dim=64, views=1, dtype=dtype)
    features = np.random.default_rng(0).normal(size=(500, 64))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    cache = TeacherCache(tmp_path, key)
    write(cache, 0, np.arange(500), features)
    cache.flush()
    content = bytearray((cache.folder / "features.bin").read_bytes())
    row = len(content) // 500
    content[2 * PAGE : 3 * PAGE] = bytes(PAGE)
    (cache.folder / "features.bin").write_bytes(content)
    again = TeacherCache(tmp_path, key)
    assert np.flatnonzero(again.missing(0, np.arange(500))).tolist() == list(range(2 * PAGE // row, 3 * PAGE // row))
    assert again.damaged == PAGE // row
    assert again.missing(0, np.arange(500)).sum() == again.damaged  # they are counted once
