import errno
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comkd_cli.errors import CheckpointError
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache

KEY = CacheKey("a" * 64, images=10, dim=3, views=4, dtype="fp32")


def test_what_was_written_is_read_back_also_by_another_opening(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    cache = TeacherCache(tmp_path, KEY)
    assert cache.missing(2, np.array([7, 1, 4])).all()
    cache.write(2, np.array([7, 1, 4]), features)
    cache.flush()
    again = TeacherCache(tmp_path, KEY)
    assert np.array_equal(again.read(2, np.array([4, 7])), features[[2, 0]])
    assert again.missing(2, np.arange(10)).tolist() == [True, False, True, True, False, True, True, False, True, True]
    assert again.missing(1, np.arange(10)).all()
    assert again.count() == 3


def test_rows_say_where_an_images_feature_stands(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    rows = np.random.default_rng(1).permutation(10)
    cache = TeacherCache(tmp_path, KEY, rows)
    cache.write(1, np.arange(4), features[:4])
    assert cache.missing(1, np.array([0, 5, 3])).tolist() == [False, True, False]
    cache.write(1, np.arange(4, 10), features[4:])
    assert np.array_equal(cache.read(1, np.array([7, 2])), features[[7, 2]])
    turned = TeacherCache(tmp_path, KEY, rows[::-1])  # the same images in another order
    assert np.array_equal(turned.read(1, np.arange(10)), features[::-1])


def test_half_precision_rounds_to_the_nearest(tmp_path: Path) -> None:
    value = np.array([[0.1, -0.033333, 0.7]], dtype=np.float32)
    cache = TeacherCache(tmp_path, replace(KEY, dtype="fp16"))
    cache.write(0, np.array([0]), value)
    assert np.array_equal(cache.read(0, np.array([0])), value.astype(np.float16).astype(np.float32))


def test_the_size_that_is_told_is_that_on_disk(tmp_path: Path) -> None:
    for key in (KEY, replace(KEY, identity="b" * 64, dtype="fp16")):
        cache = TeacherCache(tmp_path, key)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.bin")) == key.size_bytes


def test_keys_have_folders_of_their_own(tmp_path: Path) -> None:
    assert TeacherCache(tmp_path, KEY).folder != TeacherCache(tmp_path, replace(KEY, identity="b" * 64)).folder


def test_a_folder_of_another_cache_or_a_damaged_one_is_told(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, KEY)
    with pytest.raises(CheckpointError, match=r"cache\.json: is another cache"):
        TeacherCache(tmp_path, replace(KEY, views=5))
    with (cache.folder / "features.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"features\.bin: has 481 bytes and not 480"):
        TeacherCache(tmp_path, KEY)
    (cache.folder / "cache.json").write_text("{")
    with pytest.raises(CheckpointError, match="to fill it anew"):
        TeacherCache(tmp_path, KEY)
    assert json.loads(json.dumps(KEY.__dict__)) == KEY.__dict__


def test_marks_without_features_are_no_cache(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, KEY)
    cache.write(0, np.arange(10), np.ones((10, 3)))
    cache.flush()
    (cache.folder / "features.bin").unlink()
    with pytest.raises(CheckpointError, match=r"features\.bin: has 0 bytes and not 480; remove"):
        TeacherCache(tmp_path, KEY)


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"can't be made 0\.0 MB large: No space left.*teacher_cache\.views"):
        TeacherCache(tmp_path, KEY)


def _fill(folder: Path, start: int) -> None:
    cache = TeacherCache(folder, KEY)
    for view in range(4):
        for index in range(start, 10, 2):
            cache.write(view, np.array([index]), np.full((1, 3), 10 * view + index, np.float32))


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


def test_the_teachers_time_a_crop_is_the_average_over_all_that_filled_it(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, KEY)
    assert cache.seconds_per_crop() is None
    cache.write(0, np.arange(10), np.zeros((10, 3)))
    cache.add_cost(20.0, 10)
    assert TeacherCache(tmp_path, KEY).seconds_per_crop() == 2.0
    cache.write(1, np.arange(5), np.zeros((5, 3)))
    cache.add_cost(40.0, 5)  # a slower machine
    assert TeacherCache(tmp_path, KEY).seconds_per_crop() == 4.0  # 60 s for 15 crops


@pytest.mark.parametrize("content", ["", "{}", '{"seconds": 1, "crops": 0}', "[1]"])
def test_a_cost_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    cache = TeacherCache(tmp_path, KEY)
    (cache.folder / "cost.json").write_text(content)
    assert cache.seconds_per_crop() is None
    cache.add_cost(3.0, 1)
    assert cache.seconds_per_crop() == 3.0
