"""A new student takes over what fits of a finished one, and refuses one of another architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.events import Event, Notice
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_clip, build_image_tower, state_sha256
from comkd_cli.models.checkpoints import StudentRecord, load_student, save_student
from comkd_cli.models.warm_start import WarmStart
from comkd_cli.recipe import Recipe, parse_recipe
from comkd_cli.recipe.model import Model
from tests import tiny

ATTENTION = {"refinement": {"weight": 1.0}, "edu_attention": {"gate_start": 0.25}}


def unit(classes: int, dim: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(classes, dim), dim=-1)


def build(recipe: Recipe, tower: Any, dim: int = 16) -> Student:
    settings, attention = recipe.student, recipe.loss.edu_attention
    return Student(tower.module, tower.width, unit(3, dim), torch.tensor(9.0), settings, attention)


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., tuple[Path, Student]]:
    """Writes student.pt of a recipe with random weights; takes fields of the recipe."""

    def make(**changes: Any) -> tuple[Path, Student]:
        recipe = parse_recipe(tiny.recipe(**changes))
        tower = build_image_tower(recipe.student, seed=7)
        student = build(recipe, tower)
        frozen = state_sha256(tower.module) if recipe.student.train == "prompts" else None
        record = tiny.student_record(recipe, tower, backbone_sha256=frozen)
        save_student(tmp_path / "student.pt", student, record)
        return tmp_path / "student.pt", student

    return make


def start(path: Path, dim: int = 16, **changes: Any) -> tuple[WarmStart, Student, str]:
    student = changes.pop("student", {"train": "full", "config": tiny.TOWER})
    recipe = parse_recipe(tiny.recipe(student={**student, "weights": str(path)}, **changes))
    found = WarmStart.of(recipe.student)
    assert found is not None
    events: list[Event] = []
    new = build(recipe, found.build_tower(recipe.student, 1, events.append), dim)
    found.load_into(new, events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    return found, new, notice.text


def test_every_tensor_of_the_same_student_is_loaded(finished: Any) -> None:
    path, old = finished(loss=ATTENTION)
    _, new, text = start(path, loss=ATTENTION)
    states = old.learned_state(), new.learned_state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert new.gate == 0.25
    assert f"{len(states[0])} of {len(states[0])} tensors" in text
    assert "from scratch" not in text


def test_what_does_not_fit_starts_from_scratch_and_is_named(finished: Any) -> None:
    path, old = finished(loss={**ATTENTION, "edu_attention": None})
    _, new, text = start(path, dim=24, loss=ATTENTION)  # a wider teacher, and EduAttention
    own, theirs = new.learned_state(), old.learned_state()
    fitting = [name for name in own if name in theirs and own[name].shape == theirs[name].shape]
    assert any(name.startswith("backbone.") for name in fitting)
    assert not any(name.startswith("edu_attention") for name in fitting)
    assert all(torch.equal(own[name], theirs[name]) for name in fitting)
    assert f"{len(fitting)} of {len(own)} tensors" in text
    assert "of projector, 7 of edu_attention, which starts from scratch" in text
    *_, text = start(finished(loss=ATTENTION)[0], loss={**ATTENTION, "edu_attention": None})
    assert "7 of edu_attention, unused" in text
    assert "from scratch" not in text


@pytest.mark.parametrize(
    ("student", "field"),
    [
        ({"train": "full", "config": {**tiny.TOWER, "embed_dim": 8}}, "student.config"),
        ({"train": "full", "arch": "ViT-B-32"}, "student.arch"),
        ({"train": "prompts", "config": tiny.TOWER}, "student.train"),
    ],
)
def test_a_student_of_another_architecture_is_refused(finished: Any, student: dict[str, Any], field: str) -> None:
    path, _ = finished()
    recipe = parse_recipe(tiny.recipe(student={**student, "weights": str(path)}))
    with pytest.raises(ModelError) as caught:
        WarmStart.of(recipe.student)
    assert caught.value.field == field


def test_a_prompts_only_student_continues_on_its_own_backbone(finished: Any, tmp_path: Path) -> None:
    weights = tmp_path / "backbone.pt"
    torch.save(build_image_tower(Model(config=tiny.TOWER), seed=3).module.state_dict(), weights)
    settings = {"train": "prompts", "config": tiny.TOWER, "weights": str(weights), "prompts": {"tokens": 2, "depth": 1}}
    path, old = finished(student=settings)
    found, new, _ = start(path, student=settings)
    assert torch.equal(new.backbone.tokens, old.backbone.tokens)  # type: ignore[arg-type,union-attr]
    record = found.record
    again = parse_recipe(tiny.recipe(student={**settings, "weights": str(path)}))
    save_student(tmp_path / "second.pt", new, StudentRecord(**{**vars(record), "recipe": again}))
    path.unlink()  # the second student needs the backbone, not the first student
    loaded, _ = load_student(tmp_path / "second.pt")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images).features, new.eval()(images).features)
    torch.save(build_image_tower(Model(config=tiny.TOWER), seed=4).module.state_dict(), weights)
    with pytest.raises(CheckpointError) as caught:
        found.build_tower(again.student, 1, lambda event: None)
    assert caught.value.path == path


def test_other_weights_are_no_warm_start(tmp_path: Path) -> None:
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for weights in (None, str(tmp_path / "clip.pt"), str(tmp_path / "text.pt"), str(tmp_path / "nowhere.pt")):
        settings = parse_recipe(
            tiny.recipe(student={"train": "full", "config": tiny.TOWER, "weights": weights})
        ).student
        assert WarmStart.of(settings) is None
