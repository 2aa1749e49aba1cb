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
    """The last epoch's weights are scored, never the best on the test images."""
    unreadable: int = 0
    """Images left out because they could not be decoded."""


def to_json(records: Sequence[Record]) -> str:
    """The document of results.json: {"records": [...]}."""
    return json.dumps({"records": [asdict(record) for record in records]}, indent=2, ensure_ascii=False) + "\n"
