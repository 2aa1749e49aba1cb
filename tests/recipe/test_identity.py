from typing import Any

import pytest

from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.identity import Identity, comparable, described, recipe_settings


def identity(minimal: dict[str, Any], **parts: Any) -> Identity:
    return Identity({"recipe": recipe_settings(parse_recipe(minimal)), **parts})


def changed(minimal: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    below = minimal.get(first, {})
    return {**minimal, first: changed(below, rest, value) if rest else value}


@pytest.fixture
def other(minimal_recipe: dict[str, Any]) -> Identity:
    return identity(changed(minimal_recipe, "optim", {"name": "adamw", "learning_rate": 0.005}))


def test_the_name_of_a_union_counts_where_every_other_field_agrees(
    minimal_recipe: dict[str, Any], other: Identity
) -> None:
    sgd = identity(changed(minimal_recipe, "optim", {"name": "sgd", "learning_rate": 0.005}))
    lines = other.differences(sgd.parts, "the finished run")
    assert lines[0] == "optim.name: sgd in the finished run, adamw now"
    assert not any(line.startswith("optim.learning_rate:") for line in lines)
    assert sgd.digest != other.digest


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("optim.epochs", 3, "optim.epochs: 20 in it, 3 now"),
        ("seed", 2, "seed: 1 in it, 2 now"),
        ("loss.if_align", {}, "loss.if_align: null in it, set now"),
        ("loss.refinement.temperature", 2.0, "loss.refinement.temperature: 1.0 in it, 2.0 now"),
        ("augment.flip", False, "augment.flip: true in it, false now"),
        ("student.weights", "laion400m_e32", "student.weights: openai in it, laion400m_e32 now"),
        ("teacher_cache", {"views": 2}, "teacher_cache: null in it, set now"),
        ("teacher.adapt", "promptsrc", "teacher.adapt.method: none in it, promptsrc now"),
    ],
)
def test_a_changed_setting_is_named(minimal_recipe: dict[str, Any], path: str, value: Any, line: str) -> None:
    before, now = identity(minimal_recipe), identity(changed(minimal_recipe, path, value))
    assert now.differences(before.parts, "it")[0] == line
    assert now.digest != before.digest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("about", "another text"),
        ("evaluate_every_epochs", 7),
        ("checkpointing", True),
        ("track", ["tensorboard"]),
        ("track_every_steps", 10),
        ("data", {"folder": "elsewhere", "unreadable_limit_percent": 50.0, "workers": 3}),
    ],
)
def test_settings_that_do_not_change_the_student_do_not_count(
    minimal_recipe: dict[str, Any], path: str, value: Any
) -> None:
    before, now = identity(minimal_recipe), identity(changed(minimal_recipe, path, value))
    assert now.differences(before.parts, "it") == []
    assert now.digest == before.digest


def test_classes_at_once_bounds_memory_and_does_not_count(minimal_recipe: dict[str, Any]) -> None:
    some, more = (
        identity(changed(minimal_recipe, "teacher.adapt", {"method": "promptsrc", "classes_at_once": count}))
        for count in (8, 16)
    )
    assert some.digest == more.digest


def test_defaults_are_written_out_so_that_a_default_that_changes_is_a_difference(
    minimal_recipe: dict[str, Any],
) -> None:
    saved = recipe_settings(parse_recipe(minimal_recipe))
    assert saved["optim"]["learning_rate"] == 0.005
    saved["optim"]["learning_rate"] = 0.004  # the default of a version before
    assert identity(minimal_recipe).differences({"recipe": saved}, "it") == [
        "optim.learning_rate: 0.004 in it, 0.005 now"
    ]


def test_a_field_that_the_saved_recipe_did_not_have_counts_with_its_default(minimal_recipe: dict[str, Any]) -> None:
    saved = recipe_settings(parse_recipe(minimal_recipe))
    del saved["optim"]["accumulation_steps"]
    assert identity(minimal_recipe).differences({"recipe": saved}, "it") == []
    parts = changed(minimal_recipe, "optim", {"accumulation_steps": 2})
    assert identity(parts).differences({"recipe": saved}, "it") == ["optim.accumulation_steps: 1 in it, 2 now"]


def test_a_recipe_of_a_version_that_had_other_fields_is_compared_field_by_field(
    minimal_recipe: dict[str, Any],
) -> None:
    saved = {**recipe_settings(parse_recipe(minimal_recipe)), "momentum_of_the_teacher": 0.5}
    lines = identity(minimal_recipe).differences({"recipe": saved}, "it")
    assert any(line.startswith("momentum_of_the_teacher: 0.5 in it, not set now") for line in lines)


def test_contents_are_named_by_what_they_are_and_not_by_their_digest(minimal_recipe: dict[str, Any]) -> None:
    before = identity(minimal_recipe, data={"class_names": ["cat", "dog"], "training_images": "a" * 64})
    now = identity(minimal_recipe, data={"class_names": ["cat", "cow"], "training_images": "b" * 64})
    assert now.differences(before.parts, "it") == [
        "data.class_names: cat, dog in it, cat, cow now",
        "the contents of the training images changed",
    ]


def test_parts_that_were_not_recorded_are_not_compared(minimal_recipe: dict[str, Any]) -> None:
    now = identity(minimal_recipe, data={"class_names": ["cat"], "training_images": "b" * 64}, teacher={"images": "c"})
    assert now.differences({"data": {"class_names": ["cat"]}}, "it") == []
    assert now.differences({"data": {"class_names": ["dog"]}}, "it") != []


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (None, 10.0, "data.holdout_percent: 0 in it, 10 now"),
        (10.0, None, "data.holdout_percent: 10 in it, 0 now"),
        (10.0, 20.0, "data.holdout_percent: 10 in it, 20 now"),
    ],
)
def test_a_share_of_held_out_images_is_the_difference_and_not_the_images_that_follow_from_it(
    minimal_recipe: dict[str, Any], before: float | None, now: float | None, line: str
) -> None:
    """A record of a version without the field was made of every image."""

    def of(share: float | None) -> Identity:
        images = {"class_names": ["cat"], "training_images": str(share), "training_labels": str(share)}
        data = images if share is None else {**images, "holdout_percent": share}
        return identity(minimal_recipe, data=data, teacher={"images": str(share), "weights_sha256": "a"})

    assert of(now).differences(of(before).parts, "it") == [line]
    assert of(now).differences(of(now).parts, "it") == []
    other = {**of(before).parts, "teacher": {"images": "x", "weights_sha256": "b"}}
    assert of(now).differences(other, "it")[1:] == ["a file of the teacher's weights or config changed"]


def test_a_record_without_the_share_of_held_out_images_equals_one_of_no_share(minimal_recipe: dict[str, Any]) -> None:
    data = {"class_names": ["cat"], "training_images": "a"}
    saved = identity(minimal_recipe, data=data).parts
    del saved["recipe"]["data"]["holdout_percent"]  # type: ignore[attr-defined]
    assert identity(minimal_recipe, data=data).differences(saved, "it") == []


def test_identities_leave_the_parts_as_they_were(minimal_recipe: dict[str, Any]) -> None:
    parts = {"recipe": recipe_settings(parse_recipe(minimal_recipe))}
    comparable(parts)
    assert parts["recipe"]["about"] == ""


def test_many_differences_are_counted() -> None:
    assert described(["a", "b"]) == "a; b"
    assert described([str(number) for number in range(7)]) == "0; 1; 2; 3; 4; and 2 more"


@pytest.mark.parametrize(
    ("then", "now", "line"),
    [
        ({}, {"templates": ["a {}", "the {}"]}, "data.templates: not set in it, a {}, the {} now"),
        ({"templates": ["a {}", "the {}"]}, {}, "data.templates: a {}, the {} in it, not set now"),
        ({}, {"descriptions": {"cat": ["a feline"]}}, "data.descriptions: not set in it, set now"),
        (
            {"descriptions": {"cat": ["a feline"]}},
            {"descriptions": {"cat": ["a cat"]}},
            "data.descriptions.cat: a feline in it, a cat now",
        ),
    ],
)
def test_prompts_that_only_one_of_two_runs_sets_are_a_difference(
    minimal_recipe: dict[str, Any], then: dict[str, Any], now: dict[str, Any], line: str
) -> None:
    earlier = identity(minimal_recipe, data={"template": "a {}", **then})
    assert identity(minimal_recipe, data={"template": "a {}", **now}).differences(earlier.parts, "it") == [line]
