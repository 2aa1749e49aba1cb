from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from comkd_cli.data.loaders import Batch
from comkd_cli.events import Event, Notice
from comkd_cli.method.teacher import Teacher
from comkd_cli.teachers.cached import CachedTeacher
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache

DIM, IMAGES = 4, 10


class Tower(nn.Module):
    """Of each picture the same feature, whatever the batch; counts the pictures, without those that pad a batch."""

    seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images.unique(dim=0))
        return images.flatten(1)[:, :DIM]


def teacher() -> Teacher:
    vectors = functional.normalize(torch.randn(3, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
    return Teacher(Tower(), vectors, torch.tensor(10.0))


def picture(view: int, index: int) -> torch.Tensor:
    return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(100 * view + index))


def batch(view: int, indices: list[int], known: np.ndarray) -> Batch:
    asked = torch.from_numpy(~known)
    pictures = [picture(view, index) for index, ask in zip(indices, asked, strict=True) if ask]
    first = torch.stack(pictures) if pictures else torch.empty(0)
    return Batch((first,), None, torch.tensor(indices), view=view, uncached=None if asked.all() else asked)


def cache(folder: Path, dtype: str = "fp16") -> TeacherCache:
    return TeacherCache(folder, CacheKey("a" * 64, IMAGES, DIM, 2, dtype))


def write(filled: TeacherCache, view: int, indices: list[int]) -> None:
    filled.put(view, np.array(indices), np.full((len(indices), DIM), 1 / np.sqrt(DIM)))
    filled.mark(view, np.array(indices))
    filled.flush()


def feature(view: int, index: int, dtype: torch.dtype) -> torch.Tensor:
    return functional.normalize(picture(view, index).flatten()[:DIM], dim=0).to(dtype).float()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_cached_and_new_features_come_in_the_order_of_the_batch(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    cached = CachedTeacher(teacher(), cache(tmp_path, name))
    for indices in ([2, 7, 5], [7, 1, 2, 9], [1, 9]):  # new; some of each; known
        known = cached.is_cached(1, np.array(indices))
        answer = cached(batch(1, indices, known))
        wanted = torch.stack([feature(1, index, dtype) for index in indices])
        assert torch.equal(answer.features, wanted)
        assert torch.allclose(answer.logits, 10 * wanted @ teacher().class_vectors.T, atol=1e-6)
        cached.flush()
    assert cached._teacher.image_tower.seen == 5
    assert np.array_equal(cache(tmp_path, name).read(1, np.array([9]))[0], feature(1, 9, dtype).numpy())


def test_new_features_are_written_at_once_and_with_several_processes_when_they_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = CachedTeacher(teacher(), cache(tmp_path))
    cached(batch(0, [1, 2], cached.is_cached(0, np.array([1, 2]))))
    assert cached.is_cached(0, np.array([1, 2, 3])).tolist() == [True, True, False]
    with monkeypatch.context() as patch:
        for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}.items():
            patch.setenv(variable, value)
        cached(batch(0, [3], np.array([False])))
        assert not cached.is_cached(0, np.array([3])).any()
    cached.flush()
    assert cached.is_cached(0, np.array([3])).all()


def test_on_several_machines_the_marks_are_those_of_the_beginning_of_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = CachedTeacher(teacher(), cache(tmp_path))
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(variable, value)
    assert not cached.is_cached(0, np.arange(3)).any()
    write(cache(tmp_path), 0, [1])  # by another machine
    assert not cached.is_cached(0, np.arange(3)).any()
    cached.is_cached(1, np.arange(3))
    assert cached.is_cached(0, np.arange(3)).tolist() == [False, True, False]


def test_savings_are_reported(tmp_path: Path) -> None:
    cached = CachedTeacher(teacher(), cache(tmp_path))
    events: list[Event] = []
    cached.report_savings(events.append)
    assert not events  # there was no batch
    for _ in range(2):
        cached(batch(0, [0, 1, 2], cached.is_cached(0, np.array([0, 1, 2]))))
        cached.flush()
    cached.report_savings(events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert "3 crops read, which saved about 0 s of the teacher's time, " in notice.text
    assert "; 3 computed" in notice.text


def test_a_later_run_knows_the_teachers_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 s a crop when the cache was filled, and a run of 100 s that reads two of them: six sevenths saved."""
    filled = cache(tmp_path)
    write(filled, 0, [0, 1])
    filled.add_cost(600.0, 2)
    now = [1000.0]
    monkeypatch.setattr("comkd_cli.teachers.cached.time.monotonic", lambda: now[0])
    cached = CachedTeacher(teacher(), cache(tmp_path))
    cached(batch(0, [0, 1], cached.is_cached(0, np.array([0, 1]))))
    now[0] += 100
    events: list[Event] = []
    cached.report_savings(events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert "2 crops read, which saved about 600 s of the teacher's time, 86% of the run; 0 computed" in notice.text


def test_damaged_features_are_computed_again_and_reported(tmp_path: Path) -> None:
    first = CachedTeacher(teacher(), cache(tmp_path))
    indices = list(range(IMAGES))
    fresh = first(batch(1, indices, first.is_cached(1, np.array(indices)))).features
    first.report_savings(lambda event: None)
    damaged = cache(tmp_path)
    for index, value in ((2, 0.0), (5, np.nan), (6, np.inf), (8, 0.4)):
        damaged._features[1, index] = value
    damaged.flush()
    again = CachedTeacher(teacher(), cache(tmp_path))
    known = again.is_cached(1, np.array(indices))
    assert np.flatnonzero(~known).tolist() == [2, 5, 6, 8]
    assert torch.equal(again(batch(1, indices, known)).features, fresh)
    events: list[Event] = []
    again.report_savings(events.append)
    assert [event.text for event in events if isinstance(event, Notice) and "damaged" in event.text] == [
        "teacher cache: 4 cached features were damaged and were computed again"
    ]
    assert cache(tmp_path).missing(1, np.array(indices)).sum() == 0
