"""What a run is made of, by name, so that two runs can be compared and their differences named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from comkd_cli.files import sha256_of_data
from comkd_cli.recipe.model import Recipe

# Settings that do not change the resulting student. Of `data` and `teacher.adapt.data`, only the classes, prompts and
# image contents count, which are separate parts: a folder may be moved.
INDIFFERENT: dict[str, Any] = {
    "schema_version": True,
    "about": True,
    "data": True,
    "evaluate_every_epochs": True,
    "track": True,
    "track_every_steps": True,
    "checkpointing": True,
    "collective_timeout_minutes": True,
    "checkpoint_every_minutes": True,
    "teacher": {"adapt": {"data": True, "classes_at_once": True}},
}
MOST_NAMED = 5
KINDS = ("method", "name")  # fields that determine which other fields exist: named first
# What a part is a digest of, by its path, for messages.
CONTENTS = {
    "data.training_images": "the contents of the training images",
    "data.training_labels": "the labels of the training images",
    "data.test_images": "the contents of the test images, which select the epoch,",
    "data.test_labels": "the labels of the test images, which select the epoch,",
    "student.weights_sha256": "a file of the student's weights or config",
    "teacher.weights_sha256": "a file of the teacher's weights or config",
    "teacher.backbone_weights_sha256": "the file in teacher.backbone_weights",
    "teacher.images": "the contents of the images that the teacher is trained on",
    "teacher.labels": "the labels of the images that the teacher is trained on",
}
# Parts that exist only if a recipe sets them: an earlier run without them had the default.
OPTIONAL = frozenset({"data.templates", "data.descriptions", "data.resized", "data.conversion"})


# What follows from `data.holdout_percent`.
DIVIDED = ("data.holdout_percent", *(name for name in CONTENTS if name.endswith(("images", "labels"))))


@dataclass(frozen=True)
class Identity:
    """Named plain data that decides a result: equal parts, equal results."""

    parts: Mapping[str, Any]
    """Every setting that counts, with defaults written out, and digests of contents."""

    @property
    def digest(self) -> str:
        """The sha256 of the parts, in hexadecimal."""
        return sha256_of_data(comparable(self.parts))

    def differences(self, earlier: Mapping[str, Any], what: str) -> list[str]:
        """The differences between these parts and earlier ones, a line each: `optim.name: adamw in WHAT, sgd now`.

        earlier: parts that were saved, perhaps by an older version. A recipe field that it did not have counts with its
        default, since the default of a new field keeps what was done before; other parts that it does not have are not
        compared, except OPTIONAL ones. A share of held-out images that was not recorded is 0, and if it differs the
        images differ with it.
        """
        then, now = comparable(earlier), comparable(self.parts)
        lines = _holdout_difference(then, now, what)
        if lines:
            then, now = _without_images(then), _without_images(now)
        for name in (name for name in now if name in then):
            before, after, path = then[name], now[name], () if name == "recipe" else (name,)
            if path and isinstance(before, Mapping) and isinstance(after, Mapping):
                after = {key: value for key, value in after.items() if key in before or f"{name}.{key}" in OPTIONAL}
            lines += _differences(before, after, path, what)
        return lines


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe as plain data, with defaults written out."""
    return recipe.model_dump(mode="json")


def comparable(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts, without the settings of the recipe that do not count."""
    found = dict(parts)
    if "recipe" in found:
        try:
            recipe = Recipe.model_validate(found["recipe"])
        except ValidationError:  # of a version that had other fields: the differences name them
            return found
        found["recipe"] = recipe.model_dump(mode="json", exclude=INDIFFERENT)
    return found


def described(lines: list[str]) -> str:
    """The first of some differences in one line, and how many more there are."""
    shown = "; ".join(lines[:MOST_NAMED])
    return shown if len(lines) <= MOST_NAMED else f"{shown}; and {len(lines) - MOST_NAMED} more"


def _holdout_difference(then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> list[str]:
    """The line on a changed share of held-out images; none if it is the same, or if images are not compared."""
    if "data" not in then or "data" not in now:
        return []
    before, after = (float(parts["data"].get("holdout_percent", 0)) for parts in (then, now))
    return [] if before == after else [f"data.holdout_percent: {before:g} in {what}, {after:g} now"]


def _without_images(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts without those that depend on the share of held-out images."""
    return {
        name: {key: value for key, value in part.items() if f"{name}.{key}" not in DIVIDED}
        if name in ("data", "teacher") and isinstance(part, Mapping)
        else part
        for name, part in parts.items()
    }


def _differences(then: Any, now: Any, path: tuple[str, ...], what: str) -> Iterator[str]:
    if then == now:
        return
    name = ".".join(path)
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted(dict.fromkeys((*now, *then)), key=_kinds_first):
            yield from _differences(then.get(key, ABSENT), now.get(key, ABSENT), (*path, str(key)), what)
    elif name in CONTENTS:
        yield f"{CONTENTS[name]} changed"
    else:
        yield f"{name}: {_shown(then)} in {what}, {_shown(now)} now"


def _kinds_first(field: str) -> int:
    return KINDS.index(field) if field in KINDS else len(KINDS)


class _Absent:
    def __eq__(self, other: object) -> bool:
        return other is self

    __hash__ = object.__hash__


ABSENT = _Absent()


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "not set"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "set"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
