"""A released student as a student.pt: its logits are those of PromptKD's wrapper, worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML

from comkd_cli.cli.app import main
from comkd_cli.data.digits import digits_source
from comkd_cli.errors import CheckpointError, ModelError, RecipeError
from comkd_cli.flows.import_student import import_student
from comkd_cli.models.backbones import build_clip
from comkd_cli.models.checkpoints import load_student
from comkd_cli.recipe import Recipe, parse_recipe
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.loading import ReadyTeacher, build_teacher
from tests import tiny
from tests.teachers.test_promptkd_checkpoint import CONFIG, DIM, features_by_hand, released_student, write

TEACHER = {**tiny.CLIP, "embed_dim": DIM, "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1}}
DEPTH = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a teacher and a released student."""
    folder = tmp_path_factory.mktemp("released")
    teacher = build_clip(Model(config=TEACHER), seed=7).model
    teacher.logit_scale.data.fill_(3.5)  # type: ignore[union-attr,operator]
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    write(folder / "model-best.pth.tar", released_student(DEPTH)[0])
    return folder


def fields(files: Path, **student: Any) -> dict[str, Any]:
    own = {"config": CONFIG, "weights": str(files / "model-best.pth.tar"), "format": "promptkd", **student}
    return tiny.recipe(teacher={"config": TEACHER, "weights": str(files / "teacher.pt")}, student=own)


def recipe(files: Path, **student: Any) -> Recipe:
    return parse_recipe(fields(files, **student))


def teacher(files: Path) -> ReadyTeacher:
    source = digits_source()
    return build_teacher(recipe(files).teacher, source.class_names, source.template, torch.device("cpu"))


def imported(files: Path, target: Path, **student: Any) -> None:
    import_student(recipe(files, **student), "released", digits_source(), teacher(files), target, lambda event: None)


def test_the_logits_are_those_of_the_wrapper(files: Path, tmp_path: Path) -> None:
    imported(files, tmp_path / "student.pt")
    student, record = load_student(tmp_path / "student.pt")
    images = torch.randn(5, 3, 16, 16)
    state, tower, own = released_student(DEPTH)
    expected = (
        torch.tensor(3.5).exp() * features_by_hand(state, tower, own, images) @ teacher(files).teacher.class_vectors.T
    )
    with torch.no_grad():
        torch.testing.assert_close(student(images).logits, expected, atol=1e-4, rtol=0)
    assert record.recipe.loss.edu_attention is None
    assert record.recipe.student.format == "clip"
    assert record.class_names == digits_source().class_names


@pytest.mark.slow
def test_the_command_writes_a_student_that_evaluate_scores_beside_its_teacher(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.few_digits(monkeypatch)
    with Path("released.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(fields(files), stream)
    made = CliRunner().invoke(main, ["import-student", "released.yaml", "--seed", "2"])
    assert made.exit_code == 0, made.output
    path = "runs/released/digits/seed2/student.pt"
    scored = CliRunner().invoke(main, ["evaluate", path, "--json"])
    assert scored.exit_code == 0, scored.output
    records = json.loads(scored.stdout)["records"]
    assert [(r["role"], r["seed"]) for r in records] == [("student", 2), ("teacher", None)]
    again = CliRunner().invoke(main, ["import-student", "released.yaml", "--seed", "2"])
    assert again.exit_code == 1
    assert "exists already" in again.output
    trained = CliRunner().invoke(main, ["distill", "released.yaml", "--seed", "3"])
    assert trained.exit_code == 1
    assert "import-student" in trained.output


def test_what_does_not_fit_is_refused(files: Path, tmp_path: Path) -> None:
    target = tmp_path / "student.pt"
    with pytest.raises(ModelError) as caught:
        imported(files, target, config={**CONFIG, "quick_gelu": False})
    assert caught.value.field == "student.config"
    shallow = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layers": 2}}  # type: ignore[dict-item]
    with pytest.raises(ModelError, match="does not hold weights of"):
        imported(files, target, config=shallow)
    plain = {"config": tiny.TOWER, "weights": None, "format": "clip", "train": "full"}
    with pytest.raises(RecipeError) as refused:
        imported(files, target, **plain)
    assert refused.value.field == "student.format"
    assert not target.exists()
    target.touch()
    with pytest.raises(CheckpointError):
        imported(files, target)


def test_a_student_of_another_teachers_embedding_is_refused(files: Path, tmp_path: Path) -> None:
    source = digits_source()
    other = Model(config=tiny.CLIP)
    torch.save(build_clip(other, seed=1).model.state_dict(), tmp_path / "other.pt")
    settings = parse_recipe(tiny.recipe(teacher={"config": tiny.CLIP, "weights": str(tmp_path / "other.pt")})).teacher
    ready = build_teacher(settings, source.class_names, source.template, torch.device("cpu"))
    with pytest.raises(ModelError, match="projector") as caught:
        import_student(recipe(files), "released", source, ready, tmp_path / "student.pt", lambda event: None)
    assert (caught.value.found, caught.value.allowed) == (DIM, [16])
