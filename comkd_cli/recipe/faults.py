"""Every fault of a recipe as one line: the file, the field, what is wrong, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Location = tuple[str | int, ...]


def describe_faults(error: ValidationError, root: type[BaseModel], origins: Mapping[str, str]) -> list[str]:
    """The faults of a validation, a line each and in the order of the recipe.

    root: the model that was validated. origins: for a dotted path, the file that it was written in; other paths have
    the origin of the nearest path above them.
    """
    lines: dict[str, str] = {}  # by path
    for fault in error.errors(include_url=False):
        location, siblings = _locate(fault["loc"], root)
        path = ".".join(map(str, location))
        origin = _origin(path, origins)
        place = f"{origin}: {path}" if path else origin
        lines.setdefault(path, f"{place}: {_reason(fault, location, siblings)}")
    # A value that fits no branch of a union is one fault, not one a branch: the one that goes deepest.
    return [line for path, line in lines.items() if not any(other.startswith(f"{path}.") for other in lines)]


def _reason(fault: Any, location: Location, siblings: list[str]) -> str:
    """What is wrong, in words. siblings: the field names that are valid beside it."""
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])
        return ("unknown field" if location else f"unknown field {name!r}") + _nearest(name, siblings)
    if fault["type"] == "missing":
        return "is missing"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if fault["type"] in ("union_tag_invalid", "literal_error"):
        given = fault["ctx"]["tag"] if "tag" in fault["ctx"] else fault["input"]
        expected = fault["ctx"].get("expected_tags") or fault["ctx"]["expected"]
        return f"should be one of {str(expected).replace(' or ', ', ')}, not {given!r}"
    if fault["type"] == "union_tag_not_found":
        return f"lacks {fault['ctx']['discriminator']}, which selects its kind"
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"should be a mapping of fields, not {fault['input']!r}"
    message: str = fault["msg"].replace("Input should", "should")
    if isinstance(fault["input"], str | int | float | bool | None):
        return f"{message}, not {fault['input']!r}"
    return message


def _origin(path: str, origins: Mapping[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return origins.get(path, "recipe")


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; the fields here are {', '.join(valid)}" if valid else ""


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model that an annotation allows, through unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_of(argument)


def _locate(location: Location, root: type[BaseModel]) -> tuple[Location, list[str]]:
    """The path as the user wrote it, and the field names that are valid where it ends.

    pydantic puts the tag or the type of a union's branch into the path; here it only narrows the models.
    """
    models, path = [root], []
    for position, name in enumerate(location):
        fields = [model.model_fields[str(name)] for model in models if str(name) in model.model_fields]
        last = position == len(location) - 1
        tagged = [m for m in models if any(f.default == name for f in m.model_fields.values())]
        if fields or isinstance(name, int) or (last and models and not tagged):
            path.append(name)
            if last:
                break
            models = [found for field in fields for found in _models_of(field.annotation)]
        else:
            models = tagged or models
    return tuple(path), sorted({name for model in models for name in model.model_fields})
