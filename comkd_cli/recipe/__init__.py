"""Recipes: a YAML file read into a typed, closed and frozen model. Imports neither torch nor open_clip."""

from comkd_cli.recipe.loading import (
    bundled_recipes,
    check_recipes,
    find_recipe,
    load_recipe,
    parse_recipe,
    read_yaml,
    recipe_of,
    to_yaml,
)
from comkd_cli.recipe.model import Recipe

__all__ = [
    "Recipe",
    "bundled_recipes",
    "check_recipes",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "read_yaml",
    "recipe_of",
    "to_yaml",
]
