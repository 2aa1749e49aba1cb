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
    """Of each picture the same feature, whatever the batch; counts the pictures."""

    seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
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


def feature(view: int, index: int, dtype: torch.dtype) -> torch.Tensor:
    return functional.normalize(picture(view, index).flatten()[:DIM], dim=0).to(dtype).float()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_kept_and_new_features_stand_in_their_places(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    asked = CachedTeacher(teacher(), cache(tmp_path, name))
    for indices in ([2, 7, 5], [7, 1, 2, 9], [1, 9]):  # new; some of each; known
        known = asked.known(1, np.array(indices))
        answer = asked(batch(1, indices, known))
        wanted = torch.stack([feature(1, index, dtype) for index in indices])
        assert torch.equal(answer.features, wanted)
        assert torch.allclose(answer.logits, 10 * wanted @ teacher().class_vectors.T, atol=1e-6)
        asked.keep()
    assert asked._teacher.image_tower.seen == 5
    assert np.array_equal(cache(tmp_path, name).read(1, np.array([9]))[0], feature(1, 9, dtype).numpy())


def test_new_features_come_to_the_cache_at_once_and_of_several_processes_when_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CachedTeacher(teacher(), cache(tmp_path))
    asked(batch(0, [1, 2], asked.known(0, np.array([1, 2]))))
    assert asked.known(0, np.array([1, 2, 3])).tolist() == [True, True, False]
    with monkeypatch.context() as patch:
        for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}.items():
            patch.setenv(variable, value)
        asked(batch(0, [3], np.array([False])))
        assert not asked.known(0, np.array([3])).any()
    asked.keep()
    assert asked.known(0, np.array([3])).all()


def test_on_several_machines_a_view_is_known_as_it_was_when_its_turn_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CachedTeacher(teacher(), cache(tmp_path))
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(variable, value)
    assert not asked.known(0, np.arange(3)).any()
    cache(tmp_path).write(0, np.array([1]), np.ones((1, DIM)))  # by another machine
    assert not asked.known(0, np.arange(3)).any()
    asked.known(1, np.arange(3))
    assert asked.known(0, np.arange(3)).tolist() == [False, True, False]


def test_it_tells_what_it_saved(tmp_path: Path) -> None:
    asked = CachedTeacher(teacher(), cache(tmp_path))
    events: list[Event] = []
    asked.tell(events.append)
    assert not events  # nothing was asked
    for _ in range(2):
        asked(batch(0, [0, 1, 2], asked.known(0, np.array([0, 1, 2]))))
        asked.keep()
    asked.tell(events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert "3 crops came from it, which saved about 0 s of the teacher's time, " in notice.text
    assert "3 went to the teacher" in notice.text


def test_a_later_run_knows_what_the_teacher_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 s a crop when the cache was filled, and a run of 100 s that reads two of them: six sevenths saved."""
    filled = cache(tmp_path)
    filled.write(0, np.array([0, 1]), np.ones((2, DIM)))
    filled.add_cost(600.0, 2)
    now = [1000.0]
    monkeypatch.setattr("comkd_cli.teachers.cached.time.monotonic", lambda: now[0])
    asked = CachedTeacher(teacher(), cache(tmp_path))
    asked(batch(0, [0, 1], asked.known(0, np.array([0, 1]))))
    now[0] += 100
    events: list[Event] = []
    asked.tell(events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert "2 crops came from it, which saved about 600 s of the teacher's time, 86% of the run; 0 went" in notice.text
