import errno
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comkd_cli.errors import CheckpointError
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache

KEY = CacheKey("a" * 64, images=10, dim=3, views=4, dtype="fp32")


def write(cache: TeacherCache, view: int, indices: np.ndarray, features: np.ndarray) -> None:
    cache.put(view, indices, features)
    cache.mark(view, indices)


def test_features_are_read_back_also_when_the_cache_is_opened_again(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
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
    features = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
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


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(tmp_path, start)) for start in (0, 1)]
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
