"""What a class is encoded from: prompt templates, and full descriptions of single classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comkd_cli.data.class_names import class_key, some
from comkd_cli.errors import DataError
from comkd_cli.recipe import read_yaml


@dataclass(frozen=True)
class Prompts:
    """The prompts of classes. The vector of a class is the normalised mean of the vectors of its prompts."""

    templates: tuple[str, ...]
    """`{}` stands for the class name."""
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By class name, the prompts of a class that replace those of the templates."""

    def of(self, class_name: str) -> tuple[str, ...]:
        """The prompts of a class, at least one."""
        from_templates = tuple(template.replace("{}", class_name) for template in self.templates)
        return self.descriptions.get(class_name, from_templates)

    def first(self) -> Prompts:
        """Only the first prompt of each class."""
        return Prompts(self.templates[:1], {name: prompts[:1] for name, prompts in self.descriptions.items()})

    def are_single(self, class_names: Sequence[str]) -> bool:
        """Whether each of these classes has one prompt."""
        return all(len(self.of(name)) == 1 for name in class_names)


def as_prompts(prompts: Prompts | str) -> Prompts:
    """Prompts, or those of one template."""
    return Prompts((prompts,)) if isinstance(prompts, str) else prompts


def openai_templates() -> tuple[str, ...]:
    """The 80 templates of openai/CLIP's ImageNet ensemble, as open_clip lists them."""
    return tuple(template("{}") for template in zero_shot_metadata().OPENAI_IMAGENET_TEMPLATES)


def zero_shot_metadata() -> Any:
    """open_clip's module of templates and of ImageNet's class names."""
    # Only this module: open_clip itself loads torch, which the data of a recipe does not need.
    package = importlib.util.find_spec("open_clip")
    assert package is not None  # a dependency
    assert package.origin is not None  # it is a package with an __init__.py
    path = Path(package.origin).with_name("zero_shot_metadata.py")
    spec = importlib.util.spec_from_file_location("comkd_openai_templates", path)
    assert spec is not None  # of a Python file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_prompts(path: Path, class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The descriptions of a YAML file that maps classes to one text or several, by the names in `class_names`.

    Spellings of a class count as equal, as in a class list. Raises DataError, also for a class that is not among the
    names, and RecipeError for a file that is not YAML.
    """
    try:
        tree = read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the prompts could not be read", path=path, found=str(error)) from error
    if not isinstance(tree, dict) or not tree:
        raise DataError("should map class names to descriptions", path=path, remedy="write `class name: description`")
    names = {class_key(name): name for name in class_names}
    if unknown := [name for name in tree if class_key(name) not in names]:
        raise DataError(
            "describes classes that the data does not have",
            path=path,
            found=some(unknown),
            allowed=some(list(class_names)),
            remedy="correct their names, or remove them",
        )
    found: dict[str, tuple[str, ...]] = {}
    for written, texts in tree.items():
        name = names[class_key(written)]
        if name in found:
            raise DataError("describes a class twice", path=path, field=written, remedy="merge the two")
        found[name] = _texts(texts, path, written)
    return found


def _texts(value: Any, path: Path, class_name: str) -> tuple[str, ...]:
    """The descriptions of one class, each in one line."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, str) and text.strip() for text in values):
        raise DataError(
            "should be a description or a list of descriptions",
            path=path,
            field=class_name,
            found=repr(value),
            remedy="write each as text, in quotes if it looks like a number",
        )
    return tuple(" ".join(text.split()) for text in values)
