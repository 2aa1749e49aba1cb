"""Result records: the one format of every result, in results.json and on standard output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

Role = Literal["student", "teacher", "baseline"]
AS_WRITTEN = ConfigDict(extra="forbid", strict=True)  # no field of another version, no "97" for 97


@dataclass(frozen=True)
class Record:
    """One score of one model on one dataset. The names of the fields have the units."""

    __pydantic_config__ = AS_WRITTEN

    model: str
    role: Role
    dataset: str
    top1_percent: float | None
    """None if the images have no labels."""
    mean_per_class_percent: float | None
    images: int
    """The number that were scored, without unreadable ones."""
    image_tower_parameters: int
    """Of everything between an image and its features, projector and attention included."""
    agreement_percent: float | None = None
    """Of a student with its teacher: the share of images for which both predict the same class."""
    seed: int | None = None
    protocol: str = "zero-shot"
    classes: Literal["all", "base", "new"] = "all"
    method: str = "clip"
    shots: int | None = None
    selection: str = "last"
    """How the epoch was selected: `last`, or `promptkd`: the best one on test images, as in PromptKD's code."""
    unreadable: int = 0
    """The number of images that could not be decoded."""
    model_sha256: str | None = None
    """Of the weights: records of the same model with other weights are out of date."""
    images_sha256: str | None = None
    """Of the test images: records of other images of the same dataset name are out of date."""
    images_from: Literal["test", "held-out", "training"] = "test"
    """The split of the images: of the dataset's own, held out by `data.holdout_percent`, or the one trained on."""
    teacher_top_answer: str | None = None
    """Beside an agreement: the class that the teacher answers most often on these images."""
    teacher_top_answer_percent: float | None = None
    """The share of the teacher's answers that are this class."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Identifies the score: of two records with the same identity, the later one replaces the earlier one."""
        return (
            *(self.model, self.role, self.dataset, self.protocol, self.classes),
            *(self.method, self.shots, self.seed, self.selection),
        )


@dataclass(frozen=True)
class Missing:
    """A model or dataset that could not be scored, and the remedy."""

    __pydantic_config__ = AS_WRITTEN

    dataset: str
    problem: str
    model: str | None = None
    """None if there is no model to score."""
    failed: bool = False
    """Whether scoring failed; False if the dataset or its student does not exist."""

    @property
    def line(self) -> str:
        """The problem, with the model in front unless the problem names it."""
        return self.problem if self.model is None or self.model in self.problem else f"{self.model}: {self.problem}"


@dataclass(frozen=True)
class Results:
    """The results of one or several evaluations."""

    records: Sequence[Record]
    missing: Sequence[Missing] = ()


def merged(kept: Results, fresh: Results) -> Results:
    """Kept results merged with those of a later evaluation.

    A fresh record replaces the one with the same identity. Kept records of the same model with other weights, or of
    the same model and dataset with other images, are dropped, because they may no longer be true. What was missing
    stays until it is scored or missing again.
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
    """Kept records whose model and dataset the fresh ones score on other images of the same dataset name."""
    images = {(r.model, r.role, r.dataset): r.images_sha256 for r in fresh.records}
    return [r for r in kept.records if _differ(r.images_sha256, images.get((r.model, r.role, r.dataset)))]


def _differ(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and first != second


def encodable(text: str) -> str:
    """The text as UTF-8 can hold it: file names that are not UTF-8 reach Python as lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def encodable_results(results: Results) -> Results:
    """The same results with texts that UTF-8 can hold."""

    def changed(entry: Any) -> Any:
        texts = {name: encodable(held) for name, held in asdict(entry).items() if isinstance(held, str)}
        return replace(entry, **texts)

    return Results(tuple(map(changed, results.records)), tuple(map(changed, results.missing)))


def to_json(results: Results) -> str:
    """The document of results.json: {"records": [...], "missing": [...]}."""
    return json.dumps(as_plain(results), indent=2, ensure_ascii=False) + "\n"


def as_plain(results: Results) -> dict[str, Any]:
    """The document of `to_json` as plain data."""
    return {
        "records": [asdict(record) for record in results.records],
        "missing": [asdict(entry) for entry in results.missing],
    }


def from_json(text: str) -> Results:
    """Results from the document that `to_json` writes, also from an older one without the newest fields.

    Raises ValueError, with the first problem, for any other text.
    """
    try:
        found = TypeAdapter(Results).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field}: {first['msg']}" if field else first["msg"]) from error
    return Results(tuple(found.records), tuple(found.missing))
