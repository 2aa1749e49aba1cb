import copy
import datetime
from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from comkd_cli.edge.images import MOST_PIXELS
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.model import AdamW, Closed, Data, EduAttention, FullAdapt, NoAdapt, Prompts, Sgd

CONFIG = {"embed_dim": 8, "vision_cfg": {"width": 16}, "text_cfg": {"width": 8}}
TOWER = {"embed_dim": 8, "vision_cfg": {"width": 16}}


def with_field(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    *parents, name = path.split(".")
    place = changed
    for parent in parents:
        place = place.setdefault(parent, {})
    place[name] = value
    return changed


def all_models(model: type[BaseModel] = Closed) -> list[type[BaseModel]]:
    return [found for child in model.__subclasses__() for found in (child, *all_models(child))]


def test_defaults_are_those_of_promptkd(minimal_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(minimal_recipe)
    assert isinstance(recipe.optim, Sgd)
    assert (recipe.optim.learning_rate, recipe.optim.momentum, recipe.optim.weight_decay) == (0.005, 0.9, 0.0005)
    assert (recipe.optim.batch_size, recipe.optim.epochs) == (8, 20)
    assert (recipe.optim.warmup_epochs, recipe.optim.warmup_learning_rate) == (1, 0.00001)
    assert recipe.loss.refinement is not None
    assert (recipe.loss.refinement.weight, recipe.loss.refinement.temperature) == (1000, 1)
    assert (recipe.loss.if_align, recipe.loss.edu_attention) == (None, None)
    assert EduAttention().gate_start == 0
    assert (Prompts().tokens, Prompts().depth) == (4, 9)
    assert recipe.student.projector.layers == 2
    assert (recipe.augment.min_scale, recipe.augment.flip) == (0.08, True)
    assert recipe.teacher.adapt == NoAdapt()


@pytest.mark.parametrize("model", all_models(), ids=lambda model: model.__name__)
def test_every_field_is_documented(model: type[BaseModel]) -> None:
    assert model.__doc__
    assert [name for name, field in model.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("model", all_models(), ids=lambda model: model.__name__)
def test_every_model_refuses_an_unknown_field(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"surprise": 1})
    assert ("extra_forbidden", ("surprise",)) in [(e["type"], e["loc"]) for e in caught.value.errors()]


@pytest.mark.parametrize(
    "path", ["", "data", "augment", "teacher", "teacher.adapt", "student", "student.projector", "loss", "optim"]
)
def test_no_part_of_a_recipe_can_be_changed_once_read(minimal_recipe: dict[str, Any], path: str) -> None:
    part: Any = Recipe.model_validate(minimal_recipe)
    for name in filter(None, path.split(".")):
        part = getattr(part, name)
    for name in type(part).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, getattr(part, name))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", "1"),
        ("seed", 1.0),
        ("seed", True),
        ("seed", -1),
        ("about", 3),
        ("schema_version", 2),
        ("augment.flip", 1),
        ("augment.flip", "no"),
        ("augment.min_scale", 0),
        ("augment.min_scale", 1.01),
        ("augment.min_scale", float("nan")),
        ("loss.if_align", {"weight": -0.1}),
        ("loss.labels", {"weight": -1}),
        ("loss.feature_cosine", {"temperature": 1}),
        ("loss.if_align", {"weight": float("inf")}),
        ("loss.refinement", {"temperature": 0}),
        ("loss.edu_attention", {"scale": 0}),
        ("loss.edu_attention", {"memory": "teacher"}),
        ("loss.edu_attention", {"gate_start": float("nan")}),
        ("optim", {"name": "sgd", "epochs": 0}),
        ("optim", {"name": "sgd", "learning_rate": 0}),
        ("optim", {"name": "sgd", "learning_rate": "1e-3"}),
        ("optim", {"name": "sgd", "momentum": 1}),
        ("optim", {"name": "adamw", "momentum": 0.9}),
        ("optim", {"name": "adamw", "batch_size": 2.5}),
        ("optim", {"name": "adam"}),
        ("student.projector", {"layers": 5}),
        ("student.prompts", {"depth": 0}),
        ("student.train", "none"),
        ("teacher.adapt", "lora"),
        ("teacher.adapt", {"method": "full", "label_smoothing": 1}),
        ("data.workers", -1),
        ("data.unreadable_limit_percent", 100.5),
        ("precision", "float32"),
        ("evaluate_every_epochs", -1),
    ],
)
def test_a_value_out_of_range_or_of_another_kind_is_refused(
    minimal_recipe: dict[str, Any], path: str, value: Any
) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(with_field(minimal_recipe, path, value))
    assert {".".join(map(str, e["loc"]))[: len(path)] for e in caught.value.errors()} == {path}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim", {"name": "sgd", "learning_rate": 1}),
        ("loss.if_align", {"weight": 0}),
        ("augment.min_scale", 1),
        ("data.unreadable_limit_percent", 0),
        ("student.prompts", {"tokens": 0}),
        ("loss.edu_attention", {"gate_start": -0.5}),
        ("loss.edu_attention", None),
        ("evaluate_every_epochs", 0),
        ("optim", {"name": "adamw", "warmup_epochs": 0}),
    ],
)
def test_the_ends_of_a_range_and_whole_numbers_for_fractions_are_accepted(
    minimal_recipe: dict[str, Any], path: str, value: Any
) -> None:
    dumped: Any = Recipe.model_validate(with_field(minimal_recipe, path, value)).model_dump()
    for name in path.split("."):
        dumped = dumped[name]
    assert dumped == value or dumped | value == dumped


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of `dataset`, `folder` and `shards`"),
        ({"dataset": "digits", "folder": "x"}, "exactly one of `dataset`, `folder` and `shards`"),
        ({"folder": "x", "shards": "x.tar", "classes": ["a", "b"]}, "exactly one of `dataset`, `folder` and `shards`"),
        ({"shards": "x.tar"}, "`shards` have no labels: set `classes`"),
        ({"dataset": "digits", "classes": ["a", "b"]}, "`classes` needs `folder`"),
        ({"shards": "x.tar", "classes": ["a", "b"], "labels": "labels.csv"}, "`labels` needs `folder`"),
        ({"folder": "x", "template": "a photo"}, "must contain {} once"),
        ({"folder": "x", "template": "{} or {}"}, "must contain {} once"),
        ({"folder": "x", "templates": ["a {}", "a photo"]}, "`templates` must contain {} once"),
        ({"folder": "x", "templates": ["a {}", "a {}"]}, "repeats a template"),
        ({"folder": "x", "templates": []}, "is empty"),
        ({"folder": "x", "templates": "a {}"}, "a list or `openai`"),
        ({"folder": "x", "templates": ["a {}"], "template": "the {}"}, "cannot be combined"),
    ],
)
def test_data_names_one_source_and_a_template_with_one_place(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Data.model_validate(fields)


def test_classes_may_be_a_file_or_a_list_and_a_list_is_kept_in_order() -> None:
    assert Data.model_validate({"folder": "x", "classes": "names.txt"}).classes == "names.txt"
    assert Data.model_validate({"folder": "x", "classes": ["b", "a"]}).classes == ("b", "a")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"weights": "w"}, "exactly one of `arch` and `config`"),
        ({"arch": "A", "config": CONFIG, "weights": "w"}, "exactly one of `arch` and `config`"),
        ({"config": {"text_cfg": {}}, "weights": "w"}, "lacks embed_dim and vision_cfg"),
        ({"config": TOWER, "weights": "w"}, "lacks text_cfg"),
        ({"arch": "A"}, "random weights"),
        ({"config": CONFIG}, "random weights"),
        ({"config": CONFIG, "adapt": "none"}, "random weights"),
    ],
)
def test_a_teacher_needs_one_architecture_and_something_to_teach(
    minimal_recipe: dict[str, Any], teacher: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**minimal_recipe, "teacher": teacher})


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), datetime.date(2024, 1, 1)])
def test_a_model_config_holds_what_json_can_write_alone(minimal_recipe: dict[str, Any], odd: Any) -> None:
    fields = {**minimal_recipe, "student": {"config": {**TOWER, "more": [odd]}, "train": "full"}}
    with pytest.raises(ValidationError, match="only numbers, words, lists and mappings"):
        Recipe.model_validate(fields)


def test_a_teacher_of_random_weights_is_fine_where_it_is_trained(minimal_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({**minimal_recipe, "teacher": {"config": CONFIG, "adapt": "full"}})
    assert recipe.teacher.adapt == FullAdapt()
    assert recipe.teacher.config == CONFIG


def test_the_short_form_of_adapt_is_the_long_one_with_defaults(minimal_recipe: dict[str, Any]) -> None:
    short, long = (
        Recipe.model_validate(with_field(minimal_recipe, "teacher.adapt", adapt))
        for adapt in ("full", {"method": "full", "learning_rate": 0.001, "batch_size": 128, "epochs": 20})
    )
    assert short == long


def test_adapt_and_optim_are_told_apart_by_their_names(minimal_recipe: dict[str, Any]) -> None:
    changed = with_field(minimal_recipe, "optim", {"name": "adamw"})
    assert type(Recipe.model_validate(changed).optim) is AdamW
    assert type(Recipe.model_validate({**changed, "optim": {"name": "sgd"}}).optim) is Sgd


def test_a_frozen_backbone_of_random_weights_is_refused(minimal_recipe: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="freezes the backbone"):
        Recipe.model_validate({**minimal_recipe, "student": {"config": TOWER}})
    recipe = Recipe.model_validate({**minimal_recipe, "student": {"config": TOWER, "train": "full"}})
    assert recipe.student.weights is None


@pytest.mark.parametrize(
    ("loss", "teaches"),
    [
        ({"refinement": None, "if_align": None}, False),
        ({"refinement": {"weight": 0}, "if_align": None}, False),
        ({"refinement": {"weight": 0}, "if_align": {"weight": 0}}, False),
        ({"refinement": None, "if_align": {"weight": 0.1}}, True),
        ({"refinement": {"weight": 0.1}, "if_align": None, "edu_attention": None}, True),
        ({"refinement": None, "if_align": None, "labels": {}}, True),
        ({"refinement": None, "if_align": None, "feature_mse": {}}, True),
        ({"refinement": None, "if_align": None, "feature_cosine": {"weight": 0.5}}, True),
        ({"refinement": None, "if_align": None, "labels": {"weight": 0}, "feature_mse": {"weight": 0}}, False),
    ],
)
def test_a_loss_must_teach_something(minimal_recipe: dict[str, Any], loss: dict[str, Any], teaches: bool) -> None:
    fields = {**minimal_recipe, "loss": loss}
    with nullcontext() if teaches else pytest.raises(ValidationError, match="is always zero"):
        Recipe.model_validate(fields)


def test_a_batch_of_one_is_refused_since_it_has_no_statistics(minimal_recipe: dict[str, Any]) -> None:
    for optim in ({"name": "sgd", "batch_size": 1}, {"name": "adamw", "batch_size": 1}):
        with pytest.raises(ValidationError, match="greater than or equal to 2"):
            Recipe.model_validate({**minimal_recipe, "optim": optim})


@pytest.mark.parametrize("words", [{"templates": ["a {}"]}, {"templates": "openai"}, {"prompts": "prompts.yaml"}])
def test_a_teacher_that_learns_its_words_takes_no_others(minimal_recipe: dict[str, Any], words: dict[str, Any]) -> None:
    teacher = minimal_recipe["teacher"]
    learned = [{**teacher, "adapt": "promptsrc"}, {**teacher, "weights": "file.pt", "format": "promptsrc"}]
    digits = {"dataset": "digits", **words}
    of_teacher = {**teacher, "adapt": {"method": "promptsrc", "data": digits}}
    (name,) = words
    for fields, place in (
        *[({"teacher": each, "data": digits}, f"`data.{name}`") for each in learned],
        ({"teacher": of_teacher}, f"`teacher.adapt.data.{name}`"),
    ):
        with pytest.raises(ValidationError, match=place):
            Recipe.model_validate({**minimal_recipe, **fields})
    Recipe.model_validate({**minimal_recipe, "data": digits})


@pytest.mark.parametrize("missing", ["data", "teacher", "student"])
def test_data_teacher_and_student_must_be_given(minimal_recipe: dict[str, Any], missing: str) -> None:
    del minimal_recipe[missing]
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(minimal_recipe)
    assert [(e["type"], e["loc"]) for e in caught.value.errors()] == [("missing", (missing,))]


def test_the_largest_limit_of_pixels_is_that_of_the_decoder() -> None:
    assert Data.model_fields["image_limit_pixels"].default == MOST_PIXELS
    with pytest.raises(ValidationError, match="less than or equal to"):
        Data(dataset="digits", image_limit_pixels=MOST_PIXELS + 1)
