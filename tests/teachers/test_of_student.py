"""The teacher of a student is found again, and another one in its place is refused."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.errors import CheckpointError
from comkd_cli.events import Event, Notice
from comkd_cli.files import sha256_of_file
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.models.checkpoints import StudentRecord, load_student, save_student
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers import of_student
from comkd_cli.teachers.loading import build_teacher, teacher_sha256
from comkd_cli.teachers.of_student import teacher_of_student
from comkd_cli.teachers.prompted import prompted_clip
from tests import tiny

CPU = torch.device("cpu")


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def teacher(path: Path, seed: int) -> Teacher:
    torch.save(build_clip(Model(config=tiny.CLIP), seed=seed).model.state_dict(), path)
    return Teacher(config=tiny.CLIP, weights=str(path))


@pytest.fixture
def distilled(tmp_path: Path) -> Callable[..., tuple[Path, Student, StudentRecord]]:
    """A student of a zero-shot teacher from clip.pt, as student.pt would have it; takes fields of its record."""
    settings = teacher(tmp_path / "clip.pt", 3)
    names = ("cat", "dog", "fox")
    ready = build_teacher(settings, names, "a {}", CPU)
    recipe = parse_recipe(tiny.recipe(teacher={"config": tiny.CLIP, "weights": settings.weights}))

    def make(**changes: Any) -> tuple[Path, Student, StudentRecord]:
        tower = build_image_tower(recipe.student)
        record = tiny.student_record(recipe, tower, class_names=names, teacher_sha256=dict(ready.sha256))
        vectors, scale = ready.teacher.class_vectors, ready.teacher.logit_scale
        student = Student(tower.module, tower.width, vectors, scale, recipe.student, recipe.loss.edu_attention)
        return tmp_path / "student.pt", student, replace(record, **changes)

    return make


def test_the_teacher_of_a_student_is_found_again(distilled: Any, tmp_path: Path) -> None:
    events: list[Event] = []
    ready = teacher_of_student(*distilled(), CPU, report=events.append)
    assert ready.sha256 == teacher_sha256(Teacher(config=tiny.CLIP, weights=str(tmp_path / "clip.pt")))
    assert events == []


def test_a_file_that_was_overwritten_is_not_the_teacher(distilled: Any, tmp_path: Path) -> None:
    made = distilled()
    teacher(tmp_path / "clip.pt", 4)
    with pytest.raises(CheckpointError, match=r"is not the teacher that .*its sha256 was") as caught:
        teacher_of_student(*made, CPU)
    assert caught.value.path == str(tmp_path / "clip.pt")
    assert caught.value.found == sha256_of_file(tmp_path / "clip.pt")


def test_without_a_recorded_sha256_the_class_vectors_are_compared(distilled: Any, tmp_path: Path) -> None:
    made, events = distilled(teacher_sha256=None), list[Event]()
    teacher_of_student(*made, CPU, report=events.append)
    assert "did not record the sha256 of its teacher" in notices(events)[0]
    teacher(tmp_path / "clip.pt", 4)
    with pytest.raises(CheckpointError, match="is not the teacher") as caught:
        teacher_of_student(*made, CPU)
    assert str(caught.value.found).startswith("its class vectors differ from the student's")


def test_another_image_tower_with_the_same_text_encoder_is_recognised_by_the_sha256(
    distilled: Any, tmp_path: Path
) -> None:
    made = distilled()
    state = torch.load(tmp_path / "clip.pt", weights_only=True)
    torch.save({k: v + 1 if k.startswith("visual.") else v for k, v in state.items()}, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="sha256"):
        teacher_of_student(*made, CPU)


def test_another_logit_scale_is_another_teacher(distilled: Any, tmp_path: Path) -> None:
    made = distilled(teacher_sha256=None)
    state = torch.load(tmp_path / "clip.pt", weights_only=True)
    torch.save({**state, "logit_scale": state["logit_scale"] + 1}, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="is not the teacher") as caught:
        teacher_of_student(*made, CPU)
    assert re.fullmatch(r"its logit scale is 38\.\d+, and the student's 14\.\d+", str(caught.value.found))


def test_the_recorded_sha256_of_the_teacher_is_read_back(distilled: Any) -> None:
    path, student, record = distilled()
    save_student(path, student, record)
    assert load_student(path)[1] == record
    damaged = torch.load(path, weights_only=True)
    torch.save({**damaged, "teacher_sha256": {"weights": 3}}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_student(path)
    torch.save({name: value for name, value in damaged.items() if name != "teacher_sha256"}, path)
    assert load_student(path)[1].teacher_sha256 is None


def test_a_prompted_teacher_moves_to_a_device_with_its_prompts() -> None:
    """The hooks of its CLIP read them, and no attribute of the CLIP has them."""
    prompted = prompted_clip(build_clip(Model(config=tiny.CLIP)), vision_depth=1, text_depth=1, tokens=2)
    of_student._prompted_encoder(prompted).move_to(torch.device("meta"))
    assert {parameter.device.type for parameter in prompted.module.parameters()} == {"meta"}
