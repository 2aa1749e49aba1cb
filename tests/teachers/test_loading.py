"""What a teacher is checked for when it is made: its prompts, its numbers, and that it is the same as before."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.events import Event, Notice
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import PROMPTSRC_TEMPLATES, Clip, build_clip, build_image_tower, tokens_cut
from comkd_cli.models.checkpoints import StudentRecord, load_student, save_student
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers.loading import (
    build_teacher,
    encode_ensemble,
    encode_prompts,
    report_truncation,
    teacher_of_student,
    teacher_sha256,
    tokenize_prompts,
)
from tests import tiny

CPU = torch.device("cpu")
# Of 10 tokens, start and end among them, 8 are words; "a photo of a {}." leaves 3 for the name.
NAMES = ("cat", "very old cat", "very old grey cat", "very very old grey cat")


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build_clip(Model(config=tiny.CLIP), seed=3)


@pytest.fixture(scope="module")
def roomy() -> Clip:
    """Reads every prompt of these tests whole."""
    text = {**tiny.CLIP["text_cfg"], "context_length": 77}  # type: ignore[dict-item]
    return build_clip(Model(config={**tiny.CLIP, "text_cfg": text}), seed=3)


def test_cut_tokens_are_those_that_a_longer_context_has_more(clip: Clip, roomy: Clip) -> None:
    texts = [
        "a",
        "a photo of a cat.",
        *NAMES,
        "one two three four five six seven eight",
        "x" * 9,
        "naïve café &amp; co",
    ]
    texts += [f"{text} {text}" for text in texts] + ["<" * 30, "🦊" * 9, ""]
    used = [int((row == roomy.tokenize([""])[0, 1]).nonzero()[0]) + 1 for row in roomy.tokenize(texts)]
    assert tokens_cut(clip, texts) == [max(0, length - 10) for length in used]
    assert tokens_cut(roomy, texts) == [0] * len(texts)


class Words:
    """A tokenizer of the transformers library: a token a word, and one at either end."""

    def __call__(self, texts: list[str], add_special_tokens: bool, **options: object) -> dict[str, list[list[int]]]:
        assert options == {"padding": False, "truncation": False, "verbose": False}
        marks = [0] if add_special_tokens else []
        return {"input_ids": [[*marks, *([1] * len(text.split())), *marks] for text in texts]}


@pytest.mark.parametrize(("mode", "expected"), [("", [0, 0, 1]), ("clips", [0, 1, 2])])
def test_tokenizers_of_transformers_are_asked_for_the_whole_text(clip: Clip, mode: str, expected: list[int]) -> None:
    tokenizer = SimpleNamespace(
        context_length=6, tokenizer=Words(), clean_fn=lambda text: " ".join(text.split()), tokenizer_mode=mode
    )
    texts = ["one  two three", "one two three four", "one two three four five"]
    assert tokens_cut(replace(clip, tokenize=tokenizer), texts) == expected  # type: ignore[arg-type]


def test_prompts_that_are_cut_are_named_and_counted(clip: Clip) -> None:
    events: list[Event] = []
    tokenize_prompts(clip, NAMES[:2], "a photo of a {}.", events.append)
    assert events == []
    encode_prompts(clip, NAMES, "a photo of a {}.", CPU, events.append)
    (told,) = notices(events)
    assert "reads 10 tokens of a prompt: the prompts of 2 of 4 classes are cut" in told
    assert "('very old grey cat', 'very very old grey cat')" in told
    assert "the name itself loses words in 1 ('very very old grey cat')" in told
    assert "shorten `data.template` or the class names" in told


def test_a_long_template_is_told_although_the_names_are_whole(clip: Clip) -> None:
    events: list[Event] = []
    tokenize_prompts(clip, ("cat", "dog"), "{}, a type of pet that barks or does not.", events.append)
    (told,) = notices(events)
    assert "the prompts of 2 of 2 classes are cut ('cat', 'dog')" in told
    assert "the name itself" not in told


def test_only_the_first_of_many_are_named(clip: Clip) -> None:
    events: list[Event] = []
    tokenize_prompts(
        clip, [f"{letter} thing" for letter in "abcdefg"], "here there and everywhere is {} or so", events.append
    )
    assert "'e thing' and 2 more" in notices(events)[0]


def test_cut_prompts_of_an_ensemble_are_counted_over_its_templates(clip: Clip, roomy: Clip) -> None:
    events: list[Event] = []
    report_truncation(clip, ("cat", "old cat"), PROMPTSRC_TEMPLATES, events.append)
    prompts = [template.replace("{}", name) for name in ("cat", "old cat") for template in PROMPTSRC_TEMPLATES]
    count = sum(tokens > 0 for tokens in tokens_cut(clip, prompts))
    assert count
    assert f"{count} of 120 prompts of " in notices(events)[0]
    encode_ensemble(roomy, ("cat", "old cat"), PROMPTSRC_TEMPLATES, CPU, events.append)
    assert len(events) == 1
    encode_ensemble(clip, ("cat", "old cat"), PROMPTSRC_TEMPLATES, CPU, events.append)
    assert notices(events)[0] == notices(events)[1]


def test_a_teacher_that_answers_in_no_numbers_is_refused(tmp_path: Path) -> None:
    model = build_clip(Model(config=tiny.CLIP), seed=3).model
    state = {**model.state_dict(), "logit_scale": torch.tensor(100.0)}  # whose exponential is infinite
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"w\.pt: holds NaN or infinite values, first in the logit scale"):
        build_teacher(Teacher(config=tiny.CLIP, weights=str(tmp_path / "w.pt")), ("a", "b"), "{}", CPU)


def teacher(path: Path, seed: int) -> Teacher:
    torch.save(build_clip(Model(config=tiny.CLIP), seed=seed).model.state_dict(), path)
    return Teacher(config=tiny.CLIP, weights=str(path))


@pytest.fixture
def taught(tmp_path: Path) -> Callable[..., tuple[Path, Student, StudentRecord]]:
    """A student of a zero-shot teacher from clip.pt, as student.pt would have it; takes fields of its record."""
    settings = teacher(tmp_path / "clip.pt", 3)
    names = ("cat", "dog", "fox")
    ready = build_teacher(settings, names, "a {}", CPU)
    recipe = parse_recipe(tiny.recipe(teacher={"config": tiny.CLIP, "weights": settings.weights}))

    def make(**changes: Any) -> tuple[Path, Student, StudentRecord]:
        tower = build_image_tower(recipe.student)
        record = StudentRecord(
            recipe=recipe,
            recipe_name="tiny",
            source="animals",
            class_names=names,
            template="a {}",
            preprocessing=tower.preprocessing,
            backbone=tower.origin,
            backbone_sha256=None,
            teacher=None,
            identity="1",
            metrics={},
            teacher_sha256=dict(ready.sha256),
        )
        vectors, scale = ready.teacher.class_vectors, ready.teacher.logit_scale
        student = Student(tower.module, tower.width, vectors, scale, recipe.student, recipe.loss.edu_attention)
        return tmp_path / "student.pt", student, replace(record, **changes)

    return make


def test_the_teacher_of_a_student_is_found_again(taught: Any, tmp_path: Path) -> None:
    events: list[Event] = []
    ready = teacher_of_student(*taught(), CPU, report=events.append)
    assert ready.sha256 == teacher_sha256(Teacher(config=tiny.CLIP, weights=str(tmp_path / "clip.pt")))
    assert events == []


def test_a_file_that_was_overwritten_is_not_the_teacher(taught: Any, tmp_path: Path) -> None:
    made = taught()
    teacher(tmp_path / "clip.pt", 4)
    with pytest.raises(CheckpointError, match=r"clip\.pt: is not the teacher that \S+student\.pt learned from.*sha256"):
        teacher_of_student(*made, CPU)


def test_of_an_earlier_version_the_class_vectors_tell_the_teacher(taught: Any, tmp_path: Path) -> None:
    made, events = taught(teacher_sha256=None), list[Event]()
    teacher_of_student(*made, CPU, report=events.append)
    assert "did not record the sha256 of its teacher" in notices(events)[0]
    teacher(tmp_path / "clip.pt", 4)
    with pytest.raises(CheckpointError, match=r"is not the teacher .*its class vectors differ from the student's"):
        teacher_of_student(*made, CPU)


def test_another_image_tower_with_the_same_text_encoder_is_told_by_the_digest(taught: Any, tmp_path: Path) -> None:
    made = taught()
    state = torch.load(tmp_path / "clip.pt", weights_only=True)
    torch.save({k: v + 1 if k.startswith("visual.") else v for k, v in state.items()}, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="sha256"):
        teacher_of_student(*made, CPU)


def test_another_logit_scale_is_another_teacher(taught: Any, tmp_path: Path) -> None:
    made = taught(teacher_sha256=None)
    state = torch.load(tmp_path / "clip.pt", weights_only=True)
    torch.save({**state, "logit_scale": state["logit_scale"] + 1}, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=r"its logit scale is 38\.\d+, and the student's 14\.\d+"):
        teacher_of_student(*made, CPU)


def test_what_was_recorded_of_the_teacher_is_read_back(taught: Any) -> None:
    path, student, record = taught()
    save_student(path, student, record)
    assert load_student(path)[1] == record
    damaged = torch.load(path, weights_only=True)
    torch.save({**damaged, "teacher_sha256": {"weights": 3}}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_student(path)
    torch.save({name: value for name, value in damaged.items() if name != "teacher_sha256"}, path)
    assert load_student(path)[1].teacher_sha256 is None
