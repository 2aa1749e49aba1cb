from pathlib import Path

import pytest
import torch

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.models.backbones import build_clip
from comkd_cli.models.checkpoints import SavedTeacher, TeacherRecord, save_teacher
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers.loading import build_teacher, load_saved_teacher
from tests import tiny

CPU = torch.device("cpu")


def test_a_teacher_of_nan_or_infinite_values_is_refused(tmp_path: Path) -> None:
    model = build_clip(Model(config=tiny.CLIP), seed=3).model
    state = {**model.state_dict(), "logit_scale": torch.tensor(100.0)}  # whose exponential is infinite
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"w\.pt: holds NaN or infinite values, first in the logit scale"):
        build_teacher(Teacher(config=tiny.CLIP, weights=str(tmp_path / "w.pt")), ("a", "b"), "{}", CPU)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """teacher.pt of a CLIP that was trained in full on two classes."""
    clip = build_clip(Model(config=tiny.CLIP), seed=3)
    record = TeacherRecord(
        key="a" * 64,
        model={"arch": None, "config": tiny.CLIP, "weights": None},
        class_names=("cat", "dog"),
        template="a {}",
        preprocessing=clip.preprocessing,
        origin=clip.origin,
        metrics={},
    )
    save_teacher(
        tmp_path / "teacher.pt", SavedTeacher(record, torch.eye(2, 16), torch.tensor(9.0), clip.model.state_dict())
    )
    return tmp_path / "teacher.pt"


def test_a_saved_teacher_has_its_own_class_vectors_and_weights(saved: Path) -> None:
    ready = load_saved_teacher(saved, ("cat", "dog"), CPU, "a" * 64)
    assert torch.equal(ready.teacher.class_vectors, torch.eye(2, 16))
    tower = build_clip(Model(config=tiny.CLIP), seed=3).model.visual
    images = torch.randn(2, 3, 16, 16)
    features = torch.nn.functional.normalize(tower(images), dim=-1)  # type: ignore[operator]
    torch.testing.assert_close(ready.teacher.encode(images), features)
    assert ready.checkpoint == saved


def test_a_saved_teacher_of_another_key_or_of_other_classes_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_saved_teacher(saved, ("cat", "dog"), CPU, "b" * 64)
    assert (caught.value.path, caught.value.remedy) == (saved, f"delete {saved.parent} to retrain it")
    with pytest.raises(CheckpointError) as caught:
        load_saved_teacher(saved, ("cat", "fox"), CPU)
    assert (caught.value.path, caught.value.found) == (saved, "2 classes")
