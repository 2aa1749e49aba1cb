"""From YAML to a Recipe: `extends`, command-line settings, and errors that name every fault at once."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from comkd_cli.errors import MisuseError, RecipeError, did_you_mean
from comkd_cli.recipe.bounds import check_brackets, check_plain_tree, is_file
from comkd_cli.recipe.faults import describe_faults
from comkd_cli.recipe.model import DATASETS, SCHEMA_VERSION, Data, Recipe

COMMAND_LINE = "--set"
MOST_CHARACTERS = 2**24
"""Of a YAML file: a recipe has thousands, and descriptions of every class of ImageNet-21k about ten million."""

# Setting one of these removes the base recipe's values of the others: they are alternatives, and a merge of two would
# be a recipe that nobody wrote.
SUPERSEDES = {
    "data.dataset": ("folder", "labels", "shards", "classes", "template", "templates", "prompts"),
    "data.folder": ("dataset", "labels", "shards", "classes", "template", "templates", "prompts"),
    "data.shards": ("dataset", "folder", "labels", "classes", "template", "templates", "prompts", "images"),
    "data.template": ("templates",),
    "data.templates": ("template",),
    "teacher.arch": ("config", "weights", "format", "backbone_weights", "context"),
    "teacher.config": ("arch", "weights", "format", "backbone_weights", "context"),
    "student.arch": ("config", "weights", "format"),
    "student.config": ("arch", "weights", "format"),
    "optim.name": ("learning_rate", "momentum", "weight_decay", "warmup_learning_rate"),
}
# A model's config belongs to open_clip: it is replaced whole, never merged with another.
WHOLE = ("teacher.config", "student.config")


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with comkd, by name."""
    package = Path(__file__).parent.parent
    installed, checkout = package / "bundled_recipes", package.parent / "recipes"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a bundled one. Raises RecipeError."""
    path = Path(name)
    if is_file(path):
        return path
    bundled = bundled_recipes()
    # `recipes/digits.yaml`, as in the documentation, works outside a checkout too.
    if path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".yaml") and path.stem in bundled:
        return bundled[path.stem]
    raise RecipeError(
        "no such recipe",
        path=name,
        allowed=list(bundled),
        remedy=did_you_mean(path.stem, bundled) or "specify a YAML file or the name of a bundled recipe",
    )


def load_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe, the ones it extends, and `key.path=value` settings on top.

    name: a file, or the name of a bundled recipe. Raises RecipeError with every fault, a line each.
    """
    path = find_recipe(name)
    return _with_settings(*_read_extended(path, ()), str(path), settings)


def recipe_of(tree: Mapping[str, Any], settings: Sequence[str] = (), name: str = "recipe") -> Recipe:
    """As `load_recipe`, of a recipe that is plain data; `extends` names a bundled recipe or a file.

    name: what errors call it. Raises RecipeError with every fault, a line each.
    """
    return _with_settings(*_extended(copy.deepcopy(dict(tree)), Path(name), ()), name, settings)


def _with_settings(tree: dict[str, Any], origins: dict[str, str], path: str, settings: Sequence[str]) -> Recipe:
    own = _own_of_datasets(tree, path)
    changes = _parse_settings(settings)
    dataset = _dataset_of(changes) or _dataset_of(tree)
    own_images = changes.get("data")
    if isinstance(own_images, dict) and any(own_images.get(name) is not None for name in ("folder", "shards")):
        dataset = None  # they replace it
    if dataset in own:
        _merge(tree, own[dataset], f"{path}: for_dataset.{dataset}", origins)
    _merge(tree, changes, COMMAND_LINE, origins)
    return parse_recipe(tree, origins, path)


def check_recipes(names: Sequence[str]) -> dict[str, str]:
    """The faults of each recipe that cannot be used, by its name or path as given."""
    faults = {}
    for name in names:
        try:
            tree, _ = _read_extended(find_recipe(name), ())
            load_recipe(name)
            for dataset in _own_of_datasets(tree, name):
                load_recipe(name, [f"data.dataset={dataset}"])
        except RecipeError as error:
            faults[name] = str(error)
    return faults


def parse_recipe(tree: Mapping[str, Any], origins: Mapping[str, str] | None = None, name: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises RecipeError with every fault, a line each."""
    check_plain_tree(tree, name)
    _check_version(tree, (origins or {}).get("schema_version", name))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = describe_faults(error, Recipe, {"": name, **(origins or {})})
        count = f"{len(lines)} fault{'s' if len(lines) > 1 else ''}"
        raise RecipeError("\n".join([f"{count}:", *(f"  {line}" for line in lines)]), path=name) from error


def parse_data(fields: Mapping[str, Any]) -> Data:
    """Only the data part of a recipe, from plain data. Raises RecipeError."""
    try:
        return Data.model_validate(fields)
    except ValidationError as error:
        raise RecipeError("\n".join(describe_faults(error, Data, {"": "data"}))) from error


def to_yaml(recipe: Recipe, ascii_only: bool = False) -> str:
    """A recipe with every default written out, as YAML that reads back to the same recipe.

    ascii_only: write other characters as escapes.
    """
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    tree = recipe.model_dump(mode="json")
    # ruamel cannot read back every long text that it folds, nor these three characters, which are line breaks to its
    # writer but not to its reader, unless they are escaped.
    writer.width = 2**20
    odd = set("\x85\u2028\u2029") & set(json.dumps(tree, ensure_ascii=False))
    writer.allow_unicode = not (odd or ascii_only)
    writer.dump(tree, stream)
    return stream.getvalue()


def read_yaml(text: str, name: str) -> Any:
    """Plain data from YAML 1.2 (so 1e-3 is a number, `no` a word, a repeated key an error). Raises RecipeError."""
    if len(text) > MOST_CHARACTERS:
        raise RecipeError("is too long", path=name, found=len(text), allowed=f"{MOST_CHARACTERS:,} characters")
    check_brackets(text, name)
    try:
        tree = YAML(typ="safe", pure=True).load(text)
        check_plain_tree(tree, name)
        return _plain(tree, name)
    except (YAMLError, ValueError, IndexError) as error:  # what looks like a date or a number but is neither
        raise RecipeError("is not valid YAML", path=name, found=" ".join(str(error).split())) from error
    except RecursionError as error:  # an alias of itself
        raise RecipeError("is nested without end, or too deeply", path=name) from error


def _read_extended(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe file merged over what it extends, and for each dotted path the file that wrote it."""
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path.resolve()))
        raise RecipeError("is circular", path=path, field="extends", found=chain)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("could not be read", path=path, found=str(error)) from error
    own = read_yaml(text, str(path))
    if not isinstance(own, dict):
        raise RecipeError("is not a recipe: its top level must be fields, such as `data:`", path=path)
    return _extended(own, path, (*seen, path.resolve()))


def _extended(own: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of a recipe merged over what it extends, and for each dotted path the file that wrote it."""
    _check_version(own, str(path))
    base = own.pop("extends", None)
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str):
            raise RecipeError("should be the path of one recipe", path=path, field="extends", found=repr(base))
        beside = path.parent / base
        tree, origins = _read_extended(beside if is_file(beside) else _find_base(base, path), seen)
    _merge(tree, own, str(path), origins)
    return tree, origins


def _check_version(tree: Mapping[str, Any], origin: str) -> None:
    """Refuse a recipe of a later format at once: what else is wrong with it cannot be known."""
    version = tree.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RecipeError(
            "the recipe was written for a newer comkd",
            path=origin,
            field="schema_version",
            found=version,
            allowed=[SCHEMA_VERSION],
            remedy="upgrade comkd (pip install --upgrade comkd)",
        )


def _own_of_datasets(tree: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Remove `for_dataset` from a recipe; returns the fields that it overrides, by dataset."""
    own = tree.pop("for_dataset", None)
    own = {} if own is None else own
    if not isinstance(own, dict) or not all(fields is None or isinstance(fields, dict) for fields in own.values()):
        raise RecipeError("should be a mapping of datasets to fields", path=name, field="for_dataset")
    if unknown := [dataset for dataset in own if dataset not in DATASETS]:
        raise RecipeError(
            "unknown dataset",
            path=name,
            field="for_dataset",
            found=repr(unknown[0]),
            allowed=DATASETS,
            remedy=did_you_mean(unknown[0], DATASETS),
        )
    # With null, a recipe removes the fields of a dataset that the recipe it extends has.
    own = {dataset: fields for dataset, fields in own.items() if fields is not None}
    if data := [dataset for dataset, fields in own.items() if "data" in fields]:
        raise RecipeError("cannot change `data`, which selects it", path=name, field=f"for_dataset.{data[0]}")
    return own


def _dataset_of(tree: Mapping[str, Any]) -> str | None:
    data = tree.get("data")
    dataset = data.get("dataset") if isinstance(data, Mapping) else None
    return dataset if isinstance(dataset, str) else None


def _find_base(base: str, path: Path) -> Path:
    try:
        return find_recipe(base)
    except RecipeError as error:
        raise RecipeError(
            error.problem, path=path, field="extends", found=base, allowed=error.allowed, remedy=error.remedy
        ) from error


def _plain(tree: Any, name: str) -> Any:
    """The same data with string keys only; a recipe with any other key is refused."""
    if isinstance(tree, dict):
        if odd := [key for key in tree if not isinstance(key, str)]:
            raise RecipeError("a field name is not text", path=name, found=repr(odd[0]))
        return {key: _plain(value, name) for key, value in tree.items()}
    return [_plain(value, name) for value in tree] if isinstance(tree, list) else tree


def _parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """All `key.path=value` settings as one tree, so that their order does not matter; values are YAML."""
    tree: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise MisuseError(
                "is not a setting",
                field=f"{COMMAND_LINE} {setting}",
                remedy="write key.path=value, such as optim.epochs=10",
            )
        place = tree
        for name in names[:-1]:
            below = place.get(name)
            place[name] = below if isinstance(below, dict) else {}
            place = place[name]
        value = read_yaml(text, f"{COMMAND_LINE} {setting}")
        if isinstance(value, dict) and isinstance(place.get(names[-1]), dict):
            value = {**place[names[-1]], **value}
        place[names[-1]] = value
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any], origin: str, origins: dict[str, str], at: str = "") -> None:
    """Lay `over` on `base` in place, mapping by mapping; lists and scalars are replaced whole."""
    for key, value in over.items():
        if value is not None and base.get(key) != value:
            for other in SUPERSEDES.get(f"{at}{key}", ()):
                if other not in over:
                    base.pop(other, None)
    for key, value in over.items():
        path = f"{at}{key}"
        origins[path] = origin
        if path == "teacher.adapt":
            value = _adapt_as_mapping(value)
        if not isinstance(value, Mapping) or path in WHOLE:
            base[key] = value
            continue
        below = base.get(key)
        if path == "teacher.adapt":
            below = _adapt_as_mapping(below)
            if isinstance(below, Mapping) and value.get("method", below.get("method")) != below.get("method"):
                below = None  # another method has other fields
        base[key] = dict(below) if isinstance(below, Mapping) else {}
        _merge(base[key], value, origin, origins, f"{path}.")


def _adapt_as_mapping(value: Any) -> Any:
    """`adapt: full` is short for `adapt: {method: full}`; a merge needs the long form."""
    return {"method": value} if isinstance(value, str) else value
