"""Classes that are added to a student by name: what is written, what is refused, and what the result is good for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from comkd_cli.data.prompts import Prompts
from comkd_cli.errors import CheckpointError, DataError, MisuseError
from comkd_cli.events import Event, Notice
from comkd_cli.flows.classes import Added, AddOptions, add_classes, list_classes
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.models.checkpoints import load_student, save_student
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Data, Model
from comkd_cli.teachers.loading import build_teacher
from comkd_cli.teachers.of_student import class_encoder, teacher_of_student
from tests import tiny

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "owl")
PROMPTS = Prompts(("a {}.", "the {}"), {"dog": ("a hound", "a puppy")})
CANDIDATES = {"refinement": {"weight": 1.0}, "edu_attention": {"memory": "candidates", "gate_start": 0.5}}


def quietly(event: Event) -> None:
    """Reports are not the point of most tests."""


@pytest.fixture
def zero_shot(tmp_path: Path, weights: Path) -> Callable[..., Path]:
    """Writes student.pt of a zero-shot teacher with several prompts a class; takes class vectors and recipe fields."""

    def make(vectors: torch.Tensor | None = None, **changes: Any) -> Path:
        recipe = parse_recipe(tiny.recipe(teacher={"config": tiny.CLIP, "weights": str(weights)}, **changes))
        ready = build_teacher(recipe.teacher, NAMES, PROMPTS, CPU)
        tower = build_image_tower(recipe.student, seed=2)
        vectors = ready.teacher.class_vectors if vectors is None else vectors
        scale, attention = ready.teacher.logit_scale, recipe.loss.edu_attention
        student = Student(tower.module, tower.width, vectors, scale, recipe.student, attention)
        record = tiny.student_record(
            recipe,
            tower,
            class_names=NAMES,
            template=PROMPTS.templates[0],
            teacher_sha256=dict(ready.sha256),
            templates=PROMPTS.templates,
            descriptions=dict(PROMPTS.descriptions),
        )
        save_student(tmp_path / "student.pt", student, record)
        return tmp_path / "student.pt"

    return make


@torch.no_grad()
def by_hand(weights: Path, prompts: list[str]) -> torch.Tensor:
    clip = build_clip(Model(config=tiny.CLIP, weights=str(weights)))
    features = functional.normalize(clip.model.encode_text(clip.tokenize(prompts)), dim=-1)  # type: ignore[operator]
    return functional.normalize(features.mean(0), dim=0)


@pytest.mark.slow
def test_a_new_class_has_the_vector_of_the_runs_templates(zero_shot: Any, weights: Path) -> None:
    path = zero_shot()
    before, content = load_student(path)[0], path.read_bytes()
    target, added = add_classes(path, ["red_fox", "bee"], AddOptions(), quietly)
    assert target == path.with_name("student-classes.pt")
    assert path.read_bytes() == content
    student, record = load_student(target)
    assert record.class_names == (*NAMES, "red fox", "bee")
    assert record.classes_added == ("red fox", "bee")
    assert list_classes(target) == record
    assert torch.equal(student.class_vectors[:3], before.class_vectors)
    torch.testing.assert_close(student.class_vectors[3], by_hand(weights, ["a red fox.", "the red fox"]))
    cosines = student.class_vectors[3] @ student.class_vectors.T
    cosines[3] = -1
    nearest = int(cosines.argmax())
    assert added[0] == Added("red fox", record.class_names[nearest], pytest.approx(float(cosines[nearest]), abs=1e-6))
    ready = teacher_of_student(target, student, record, CPU)
    torch.testing.assert_close(ready.teacher.class_vectors, student.class_vectors)


@pytest.mark.slow
def test_a_template_of_its_own_is_on_record(zero_shot: Any, weights: Path) -> None:
    options = AddOptions(templates=("one {}", "two {}"))
    target, _ = add_classes(zero_shot(), ["fox"], options, quietly)
    student, record = load_student(target)
    torch.testing.assert_close(student.class_vectors[3], by_hand(weights, ["one fox", "two fox"]))
    assert record.prompts.of("fox") == ("one fox", "two fox")
    teacher_of_student(target, student, record, CPU)
    second, _ = add_classes(target, ["bee"], AddOptions(out=target.with_name("more.pt")), quietly)
    assert load_student(second)[1].classes_added == ("fox", "bee")


@pytest.mark.slow
@pytest.mark.parametrize("loss", [CANDIDATES, {**CANDIDATES, "edu_attention": {"gate_start": 0.5}}])
def test_the_memory_of_a_run_stays_and_that_of_candidates_grows(zero_shot: Any, loss: dict[str, Any]) -> None:
    path = zero_shot(loss=loss)
    target, _ = add_classes(path, ["fox"], AddOptions(), quietly)
    (before, _), (after, _) = load_student(path), load_student(target)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        grown = before(images, after.class_vectors) if loss is CANDIDATES else before(images)
        answered = after(images)
    torch.testing.assert_close(answered.features, grown.features)
    torch.testing.assert_close(answered.logits, after.logit_scale * grown.features @ after.class_vectors.T)


def test_a_file_is_replaced_with_force_alone(zero_shot: Any) -> None:
    path = zero_shot()
    with pytest.raises(MisuseError) as caught:
        add_classes(path, ["fox"], AddOptions(out=path), quietly)
    assert (caught.value.path, caught.value.exit_code) == (path, 2)
    add_classes(path, ["fox"], AddOptions(out=path, force=True), quietly)
    assert load_student(path)[1].class_names == (*NAMES, "fox")


@pytest.mark.parametrize("names", [["Dog"], ["fox", "FOX"], ["a\nb"], [" "]])
def test_names_that_cannot_be_added_are_refused(zero_shot: Any, names: list[str]) -> None:
    path = zero_shot()
    with pytest.raises(DataError) as caught:
        add_classes(path, names, AddOptions(), quietly)
    assert str(caught.value.field).startswith("--add")
    assert not path.with_name("student-classes.pt").exists()


@pytest.mark.slow
def test_a_name_that_the_text_encoder_reads_as_another_class_is_refused(zero_shot: Any) -> None:
    target, _ = add_classes(zero_shot(), ["fox & bee"], AddOptions(), quietly)
    with pytest.raises(DataError) as caught:  # the tokenizer reads the entities of HTML
        add_classes(target, ["fox &amp; bee"], AddOptions(out=target.with_name("more.pt")), quietly)
    assert (caught.value.field, caught.value.found) == ("--add", "'fox &amp; bee'")


def test_two_names_with_the_same_tokens_are_refused(zero_shot: Any) -> None:
    long = "very very very very very very very old"
    with pytest.raises(DataError):
        add_classes(zero_shot(), [f"{long} fox", f"{long} bee"], AddOptions(), quietly)


def test_a_class_that_is_nearly_another_is_a_warning(zero_shot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr("comkd_cli.flows.classes.NEARLY_EQUAL_COSINE", -1.0)
    _, (entry,) = add_classes(zero_shot(), ["fox"], AddOptions(), events.append)
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text.startswith(f"fox: its vector is nearly identical to that of {entry.nearest} (cosine ")


def test_a_template_without_a_place_for_the_name_is_refused(zero_shot: Any) -> None:
    with pytest.raises(MisuseError) as caught:
        add_classes(zero_shot(), ["fox"], AddOptions(templates=("a photo",)), quietly)
    assert caught.value.field == "--template"


def test_class_vectors_of_a_head_that_was_fitted_are_refused(zero_shot: Any) -> None:
    path = zero_shot(vectors=functional.normalize(torch.randn(3, 16), dim=-1))
    with pytest.raises(CheckpointError) as caught:
        add_classes(path, ["fox"], AddOptions(), quietly)
    assert str(caught.value.found).startswith("smallest cosine")


def test_a_student_without_its_teacher_is_refused(zero_shot: Any, weights: Path, tmp_path: Path) -> None:
    path = zero_shot()
    recorded = torch.load(path, weights_only=True)
    recorded["recipe"]["teacher"]["weights"] = str(tmp_path / "gone.pt")
    torch.save({**recorded, "teacher_sha256": {}}, path)
    with pytest.raises(CheckpointError) as caught:
        add_classes(path, ["fox"], AddOptions(), quietly)
    assert caught.value.path == path


@pytest.mark.slow
def test_a_student_of_a_trained_teacher_gets_classes_and_is_scored_as_before(
    tiny_student: Path, tmp_path: Path
) -> None:
    options = AddOptions(out=tmp_path / "elsewhere/new.pt", templates=())
    target, _ = add_classes(tiny_student, ["fox"], options, quietly)
    student, record = load_student(target)
    assert record.teacher is not None
    assert (target.parent / record.teacher).samefile(next(tiny_student.parents[3].glob("teachers/*/teacher.pt")))
    encoder = class_encoder(record, target)
    torch.testing.assert_close(encoder.vectors(record.class_names), student.class_vectors, atol=1e-5, rtol=0)
    events: list[Event] = []
    bench = Bench(CPU, Path("data"), events.append, data=Data(dataset="digits"))
    before, after = (evaluate(str(path), Path("runs"), bench).records for path in (tiny_student, target))
    assert [record.role for record in after] == ["student", "teacher"]
    for old, new in zip(before, after, strict=True):
        assert (old.top1_percent, old.agreement_percent) == (new.top1_percent, new.agreement_percent)
    assert sum(isinstance(event, Notice) and "were added: fox" in event.text for event in events) == 1


def test_a_damaged_list_of_added_classes_is_refused(zero_shot: Any) -> None:
    path = zero_shot()
    torch.save({**torch.load(path, weights_only=True), "classes_added": ["cat"]}, path)
    with pytest.raises(CheckpointError):
        list_classes(path)
