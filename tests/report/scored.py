"""Runs as the report gets them, without a model: answers are given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing
from comkd_cli.evaluation.answers import Answers, Distances
from comkd_cli.models.backbones import Origin
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.recipe import parse_recipe
from comkd_cli.report.run import ScoredModel, ScoredRun
from tests import tiny

NAMES = ("ant", "bee", "cat")


def open_grey(key: str) -> Image.Image:
    return Image.new("RGB", (40, 30), (len(key) % 256, 90, 60))


def model(predicted: Sequence[int], confidence: Sequence[float] | None = None, name: str = "model") -> ScoredModel:
    sure = np.linspace(0.4, 0.9, len(predicted)) if confidence is None else np.asarray(confidence, float)
    answers = Answers(np.arange(len(predicted)), np.asarray(predicted, np.int64), sure)
    return ScoredModel(name, f"sha of {name}", 1000, 20_000, 16, answers)


def scored_run(
    folder: Path,
    student: Sequence[int],
    teacher: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    names: Sequence[str] = NAMES,
    keys: Sequence[str] | None = None,
    recipe: dict[str, Any] | None = None,
    **changes: Any,
) -> ScoredRun:
    """A run in a folder, with the answers of student and teacher to as many images."""
    path = folder / "student.pt"
    path.write_bytes(b"weights")
    images = ImageSet(
        tuple(keys or (f"{i:03d}.png" for i in range(len(student)))),
        None if labels is None else tuple(labels),
        open_grey,
    )
    facts = StudentRecord(
        recipe=parse_recipe(tiny.recipe(**(recipe or {}))),
        recipe_name="tiny",
        source="insects",
        class_names=tuple(names),
        template="a photo of a {}.",
        preprocessing=Preprocessing(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        backbone=Origin("inline config", None, None, "gelu"),
        backbone_sha256=None,
        teacher=None,
        identity="id",
        metrics={},
        identity_parts={"data": {"training_images": "other"}},
    )
    fields: dict[str, Any] = {
        "path": path,
        "facts": facts,
        "dataset": "insects",
        "class_names": tuple(names),
        "images": images,
        "training_images": 7,
        "student": model(student, name=str(path)),
        "teacher": None if teacher is None else model(teacher, name="teacher.pt"),
        "distances": None if teacher is None else Distances(np.arange(len(student)), np.linspace(0, 1, len(student))),
        "learned_test_images": False,
        "unreadable": (),
        "notices": (),
        "history": [],
        "manifest": None,
    }
    return ScoredRun(**{**fields, **changes})
