import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from comkd_cli.errors import RecipeError
from comkd_cli.recipe import Recipe, load_recipe, parse_recipe
from comkd_cli.recipe.faults import describe_faults

CONFIG = {"embed_dim": 8, "vision_cfg": {"width": 16}, "text_cfg": {"width": 8}}
WHOLE = {
    "data": {"folder": "pictures", "classes": ["a", "b"]},
    "teacher": {"config": CONFIG, "adapt": {"method": "full"}},
    "student": {"config": CONFIG, "train": "full", "prompts": {"tokens": 2}},
    "optim": {"name": "adamw"},
}


def faults(tree: dict[str, Any]) -> list[str]:
    """The lines below the heading of a refusal, without their indent."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree, name="r.yaml")
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"r.yaml: {len(lines)} fault{'s' if len(lines) > 1 else ''}:"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def field_paths(tree: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*at, name)
        if isinstance(value, dict) and name != "config":
            yield from field_paths(value, (*at, name))


def with_sibling(tree: dict[str, Any], path: tuple[str, ...], name: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    place = changed
    for parent in path[:-1]:
        place = place[parent]
    place[name] = value
    return changed


DUMPED = parse_recipe(WHOLE).model_dump(mode="json")


@pytest.mark.parametrize("path", list(field_paths(DUMPED)), ids=".".join)
def test_a_misspelt_field_is_named_with_the_field_that_was_meant(path: tuple[str, ...]) -> None:
    misspelt = path[-1][:-1] + "_" + path[-1][-1]
    (line,) = faults(with_sibling(DUMPED, path, misspelt, 1))
    place = ".".join((*path[:-1], misspelt))
    assert line == f"r.yaml: {place}: unknown field; did you mean {path[-1]}?"


def test_a_field_like_no_other_is_answered_with_the_fields_that_fit_there() -> None:
    (line,) = faults({**WHOLE, "optim": {"name": "sgd", "qqqq": 1}})
    assert line == (
        "r.yaml: optim.qqqq: unknown field; the fields here are accumulation_steps, batch_size, clip_gradient_norm, "
        "epochs, learning_rate, momentum, name, warmup_epochs, warmup_learning_rate, weight_decay"
    )


def test_the_hint_knows_only_the_fields_of_the_chosen_kind() -> None:
    (line,) = faults({**WHOLE, "optim": {"name": "adamw", "momentum": 0.9}})
    assert line.startswith("r.yaml: optim.momentum: unknown field; the fields here are ")
    assert "momentum" not in line.partition("here are")[2]
    (line,) = faults({**WHOLE, "teacher": {"config": CONFIG, "weights": "w", "adapt": {"method": "none", "epochs": 3}}})
    assert line == "r.yaml: teacher.adapt.epochs: unknown field; the fields here are method"


def test_every_fault_is_told_at_once_with_its_path() -> None:
    tree = copy.deepcopy(WHOLE)
    tree["seed"] = -1
    tree["data"]["workers"] = 1.5
    tree["teacher"]["adapt"] = {"method": "full", "epoch": 3, "batch_size": 0}
    tree["student"]["projector"] = {"layers": 9}
    tree["loss"] = {"if_align": {"weight": "high"}, "refinement": 3}
    tree["precision"] = "fp8"
    del tree["student"]["config"]
    found = faults(tree)
    assert [line.split(": ")[1] for line in found] == [
        "seed",
        "data.workers",
        "teacher.adapt.batch_size",
        "teacher.adapt.epoch",
        "student.projector.layers",
        "loss.refinement",
        "loss.if_align.weight",
        "precision",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": "three"}, "seed: should be a valid integer, not 'three'"),
        ({"augment": {"flip": "no"}}, "augment.flip: should be a valid boolean, not 'no'"),
        (
            {"augment": {"mix": {"kind": "mixup"}}, "loss": {"labels": {}}},
            "a mixed crop has no single label: leave out `augment.mix` or `loss.labels`",
        ),
        (
            {"ema_decay": 0.99, "selection": "promptkd"},
            "`ema_decay` keeps the average of all steps: leave it out with `selection: promptkd`",
        ),
        ({"augment": {"min_scale": 0}}, "augment.min_scale: should be greater than 0, not 0"),
        ({"precision": "fp8"}, "precision: should be one of 'fp32', 'bf16', 'fp16', not 'fp8'"),
        ({"optim": {"name": "adam"}}, "optim: should be one of 'sgd', 'adamw', not 'adam'"),
        ({"optim": 3}, "optim: should be a mapping of fields, not 3"),
        ({"loss": None}, "loss: should be a mapping of fields, not None"),
        ({"data": {"folder": "x", "dataset": "digits"}}, "data: needs exactly one of `dataset`, `folder` and `shards`"),
        ({"data": {"folder": "x", "classes": 5}}, "data.classes: should be a valid string, not 5"),
        ({"data": {"folder": "x", "classes": [1, "b"]}}, "data.classes.0: should be a valid string, not 1"),
    ],
)
def test_a_fault_says_what_is_wrong_and_what_was_given(change: dict[str, Any], line: str) -> None:
    assert faults({**WHOLE, **change}) == [f"r.yaml: {line}"]


def test_missing_parts_are_told_by_name() -> None:
    assert faults({}) == [f"r.yaml: {part}: is missing" for part in ("data", "teacher", "student")]


def test_a_fault_of_the_recipe_as_a_whole_names_the_recipe_alone() -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate("not a mapping")
    (line,) = describe_faults(caught.value, Recipe, {"": "r.yaml"})
    assert line == "r.yaml: should be a mapping of fields, not 'not a mapping'"


def test_every_fault_of_an_optimiser_without_a_name_is_told() -> None:
    lines = faults({**WHOLE, "optim": {"epohcs": 3, "batch_size": "x"}})
    assert lines == [
        "r.yaml: optim.batch_size: should be a valid integer, not 'x'",
        "r.yaml: optim.epohcs: unknown field; did you mean epochs?",
    ]


def test_each_fault_names_the_file_that_wrote_it(tmp_path: Path) -> None:
    def write(name: str, tree: dict[str, Any]) -> None:
        with (tmp_path / name).open("w") as stream:
            YAML(typ="safe", pure=True).dump(tree, stream)

    write("base.yaml", {**WHOLE, "seed": -1, "loss": {"if_align": {"weight": -2}, "refinement": {"weight": -3}}})
    write("child.yaml", {"extends": "base.yaml", "loss": {"if_align": {"weight": -4}}, "augment": {"flip": "x"}})
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "child.yaml", ["augment.min_scale=7", "precison=fp16"])
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    assert str(caught.value).splitlines() == [
        f"{child}: 6 faults:",
        f"  {base}: seed: should be greater than or equal to 0, not -1",
        "  --set: augment.min_scale: should be less than or equal to 1, not 7",
        f"  {child}: augment.flip: should be a valid boolean, not 'x'",
        f"  {base}: loss.refinement.weight: should be greater than or equal to 0, not -3",
        f"  {child}: loss.if_align.weight: should be greater than or equal to 0, not -4",
        "  --set: precison: unknown field; did you mean precision?",
    ]
