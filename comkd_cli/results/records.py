"""Result records: the one shape of every result, in results.json and on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Role = Literal["student", "teacher", "baseline"]


@dataclass(frozen=True)
class Record:
    """One score of one model on one data set. Units stand in the names."""

    model: str
    role: Role
    dataset: str
    top1_percent: float | None
    """None where the images have no labels."""
    mean_per_class_percent: float | None
    images: int
    """Scored; unreadable ones are not among them."""
    image_tower_parameters: int
    """Of everything between an image and its feature: projector and attention included."""
    agreement_percent: float | None = None
    """Of a student with its teacher: the share of images that both put in the same class."""
    seed: int | None = None
    protocol: str = "zero-shot"
    classes: Literal["all", "base", "new"] = "all"
    method: str = "clip"
    shots: int | None = None
    selection: str = "last"
    """`last` epoch, or as PromptKD's code selects it, on the test images of the base classes: `promptkd`."""
    unreadable: int = 0
    """Images left out because they could not be decoded."""
    model_sha256: str | None = None
    """Of the weights that were scored: records of a model with other weights are out of date."""
    images_sha256: str | None = None
    """Of the data set's test images: records of other images under the same name are out of date."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What the record is a score of: of two records that agree in it, the later one counts."""
        return (
            *(self.model, self.role, self.dataset, self.protocol, self.classes),
            *(self.method, self.shots, self.seed, self.selection),
        )


@dataclass(frozen=True)
class Missing:
    """What could not be scored, and what to do."""

    dataset: str
    problem: str
    model: str | None = None
    """None where there is no model to score."""
    failed: bool = False
    """Whether scoring failed; False where the data set or its student is absent."""

    @property
    def line(self) -> str:
        """The problem, after the model where the problem does not name it."""
        return self.problem if self.model is None or self.model in self.problem else f"{self.model}: {self.problem}"


@dataclass(frozen=True)
class Results:
    """What an evaluation found, or several."""

    records: Sequence[Record]
    missing: Sequence[Missing] = ()


def merged(kept: Results, fresh: Results) -> Results:
    """Kept results with those of a later evaluation.

    A fresh record takes the place of the one with its identity. Kept records of the same model with other weights, or
    of the same model and data set with other images, are dropped: nothing says that they still hold. What was missing
    stays until it is scored or found missing again.
    """
    weights = {(r.model, r.role): r.model_sha256 for r in fresh.records}
    dropped = set(of_other_images(kept, fresh))
    records = {
        record.identity: record
        for record in kept.records
        if not _differ(record.model_sha256, weights.get((record.model, record.role))) and record not in dropped
    }
    records |= {record.identity: record for record in fresh.records}
    missing = {
        (entry.model, entry.dataset): entry
        for entry in kept.missing
        if not any(r.dataset == entry.dataset and entry.model in (None, r.model) for r in fresh.records)
    }
    missing |= {(entry.model, entry.dataset): entry for entry in fresh.missing}
    return Results(list(records.values()), list(missing.values()))


def of_other_images(kept: Results, fresh: Results) -> list[Record]:
    """Kept records of a model and data set that fresh ones score on other images of the same name."""
    images = {(r.model, r.role, r.dataset): r.images_sha256 for r in fresh.records}
    return [r for r in kept.records if _differ(r.images_sha256, images.get((r.model, r.role, r.dataset)))]


def _differ(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and first != second


def to_json(results: Results) -> str:
    """The document of results.json: {"records": [...], "missing": [...]}."""
    return json.dumps(as_plain(results), indent=2, ensure_ascii=False) + "\n"


def as_plain(results: Results) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "records": [asdict(record) for record in results.records],
        "missing": [asdict(entry) for entry in results.missing],
    }


def from_json(text: str) -> Results:
    """Results from the document that `to_json` writes, also an older one without the newest fields.

    Raises ValueError, with what is wrong, for any other text.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("records"), list):
        raise ValueError("it holds no list of records")
    missing = document.get("missing", [])
    if not isinstance(missing, list):
        raise ValueError("`missing` is not a list")
    return Results(_entries(Record, document["records"]), _entries(Missing, missing))


Entry = TypeVar("Entry", Record, Missing)


def _entries(kind: type[Entry], found: Iterable[Any]) -> tuple[Entry, ...]:
    types = get_type_hints(kind)
    known = {field.name: field.default is MISSING for field in fields(kind)}
    entries = []
    for plain in found:
        if not isinstance(plain, dict):
            raise ValueError(f"{plain!r} is not a record")
        if strange := [name for name in plain if name not in known]:
            raise ValueError(f"this version of comkd knows no field {strange[0]!r}")
        if absent := [name for name, needed in known.items() if needed and name not in plain]:
            raise ValueError(f"a record lacks {absent[0]}")
        if wrong := [name for name, value in plain.items() if not _fits(value, types[name])]:
            raise ValueError(f"{wrong[0]}: {plain[wrong[0]]!r} is not what belongs there")
        entries.append(kind(**plain))
    return tuple(entries)


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value of JSON is of a field's type: a class, a Literal, or a union of such."""
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(annotation, type):
        return isinstance(value, annotation)
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    return any(_fits(value, part) for part in get_args(annotation))
