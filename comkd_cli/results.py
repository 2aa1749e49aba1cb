"""Result records: the one shape of every result, in results.json and on standard output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Missing:
    """What could not be scored, and what to do."""

    dataset: str
    problem: str


@dataclass(frozen=True)
class Results:
    """All that an evaluation found."""

    records: Sequence[Record]
    missing: Sequence[Missing] = ()


def to_json(results: Results) -> str:
    """The document of results.json: {"records": [...], "missing": [...]}."""
    document = {
        "records": [asdict(record) for record in results.records],
        "missing": [asdict(entry) for entry in results.missing],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
