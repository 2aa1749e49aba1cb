import json
from pathlib import Path
from typing import Any

import pytest

from comkd_cli.errors import RecipeError
from comkd_cli.recipe import bounds, load_recipe, parse_recipe
from comkd_cli.recipe.bounds import check_plain_tree
from comkd_cli.recipe.loading import read_yaml

ALIASES = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


def test_a_few_lines_that_stand_for_thousands_of_millions_of_values_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(ALIASES)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "bomb.yaml")
    assert caught.value.path == str(tmp_path / "bomb.yaml")
    assert caught.value.problem == "holds too many values"


def test_repeated_references_of_a_checkpoint_are_counted_as_often_as_they_occur(minimal_recipe: dict[str, Any]) -> None:
    config: Any = [0]
    for _ in range(30):
        config = [config, config]
    minimal_recipe["student"] = {"config": {"embed_dim": 8, "vision_cfg": {"width": config}}}
    with pytest.raises(RecipeError, match="holds too many values"):
        parse_recipe(minimal_recipe)


def test_data_without_end_and_deep_data_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RecipeError, match="nested too deeply, or without end"):
        check_plain_tree(endless, "endless")
    deep: Any = 0
    for _ in range(bounds.MOST_LEVELS - 1):
        deep = {"a": deep}
    check_plain_tree(deep, "deep enough")
    with pytest.raises(RecipeError, match="nested too deeply"):
        check_plain_tree([deep], "too deep")


def test_a_long_text_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comkd_cli.recipe.loading.MOST_CHARACTERS", 9)
    assert read_yaml("a: 123456", "short") == {"a": 123456}
    with pytest.raises(RecipeError) as caught:
        read_yaml("a: 1234567", "long")
    assert (caught.value.problem, caught.value.found) == ("is too long", 10)


@pytest.mark.parametrize("tree", [{"a": ["fox \udcff"]}, {"\ud800": 1}])
def test_text_that_is_not_utf_8_is_refused_since_no_recipe_could_be_written(tree: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        check_plain_tree(tree, "recipe.yaml")
    assert caught.value.problem == "holds text that is not UTF-8"
    assert "\\ud" in str(caught.value.found)


@pytest.mark.parametrize("bracket", ["[", "{a: "])
def test_thousands_of_open_brackets_are_refused_before_they_are_parsed(bracket: str) -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        read_yaml(bracket * 3000, "recipe.yaml")
    assert read_yaml("[" * 3 + "]" * 3, "recipe.yaml") == [[[]]]
    assert len(read_yaml("- []\n" * (2 * bounds.MOST_OPEN_BRACKETS), "recipe.yaml")) == 2 * bounds.MOST_OPEN_BRACKETS


@pytest.mark.parametrize("name", ["a/" * 3000, "a\0b"])
def test_a_path_that_no_file_system_takes_is_no_such_recipe(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(name)
    (tmp_path / "own.yaml").write_text(json.dumps({"extends": name}))
    with pytest.raises(RecipeError, match="no such recipe") as caught:
        load_recipe(tmp_path / "own.yaml")
    assert caught.value.field == "extends"


def test_a_field_without_a_name_is_an_unknown_field(minimal_recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="unknown field ''; "):
        parse_recipe({**minimal_recipe, "": 1})
