"""The parts of the report that concern one run: its classes, confusions, pictures, origin and commands."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from comkd_cli.recipe import to_yaml
from comkd_cli.report.run import ScoredModel, ScoredRun
from comkd_cli.report.statistics import ClassScore, class_scores, confusion_matrix, confusions
from comkd_cli.report.thumbnails import thumbnail

PICTURES = 24
MOST_IN_MATRIX = 25
MOST_PAIRS = 20
MOST_CLASSES = 200
VERSIONS = ("comkd", "torch", "open_clip_torch", "timm")


@dataclass(frozen=True)
class Making:
    """How the report was made."""

    command: str
    """As it was typed."""
    runs: Path
    data_root: Path


@dataclass(frozen=True)
class ClassTable:
    """Precision, recall and support of each class."""

    rows: Sequence[tuple[str, ClassScore]]
    omitted: int
    """Classes that are left out, those with the fewest errors."""


@dataclass(frozen=True)
class Cell:
    """A cell of the confusion matrix."""

    images: int
    share: float
    """Of the images of its row, in [0, 1]."""
    right: bool


@dataclass(frozen=True)
class ConfusionTable:
    """The confusion matrix of few classes, or of many the pairs that are confused most."""

    names: Sequence[str]
    cells: Sequence[Sequence[Cell]]
    pairs: Sequence[tuple[str, str, int, str]]
    """The actual class, the answer, how many images, and their share of the class."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to an image."""

    who: str
    name: str
    confidence: str
    right: bool | None
    """None if it is not known what is right."""


@dataclass(frozen=True)
class Picture:
    """A test image with the answers to it."""

    key: str
    source: str | None
    label: str | None
    answers: Sequence[Answer]
    note: str


def class_table(run: ScoredRun) -> ClassTable:
    """The scores of each class; beyond MOST_CLASSES those with the most errors."""
    predicted, reference = run.against_reference(run.student)
    rows = class_scores(predicted, reference, len(run.class_names))
    shown = rows
    if len(rows) > MOST_CLASSES:
        shown = sorted(rows, key=lambda row: (-row.errors, row.label))[:MOST_CLASSES]
    return ClassTable([(run.class_names[row.label], row) for row in shown], len(rows) - len(shown))


def confusion_table(run: ScoredRun) -> ConfusionTable:
    """The student's answers against the labels, or without labels against the teacher's answers."""
    predicted, reference = run.against_reference(run.student)
    names = run.class_names
    pairs = [
        (names[pair.actual], names[pair.answered], pair.images, f"{pair.share:.1%}")
        for pair in confusions(predicted, reference, len(names))[:MOST_PAIRS]
    ]
    if len(names) > MOST_IN_MATRIX:
        return ConfusionTable((), (), pairs)
    counts = confusion_matrix(predicted, reference, len(names))
    totals = np.maximum(counts.sum(axis=1), 1)
    cells = [
        [Cell(int(images), float(images / totals[row]), row == column) for column, images in enumerate(line)]
        for row, line in enumerate(counts)
    ]
    return ConfusionTable(names, cells, pairs)


def disagreements(run: ScoredRun) -> list[Picture]:
    """The images on which student and teacher are furthest apart, the furthest first."""
    if run.distances is None:
        return []
    order = np.argsort(-run.distances.values, kind="stable")[:PICTURES]
    return [_picture(run, int(run.distances.indices[i]), f"distance {run.distances.values[i]:.2f}") for i in order]


def least_certain(run: ScoredRun) -> list[Picture]:
    """The images on which the student gives its answer the least probability, the least first."""
    found = run.student.answers
    order = np.argsort(found.confidence, kind="stable")[:PICTURES]
    return [_picture(run, int(found.indices[i]), "") for i in order]


def origin(run: ScoredRun) -> list[tuple[str, str]]:
    """What the student was made from, as names and values."""
    return [(name, value) for name, value in _origin(run) if value]


def commands(run: ScoredRun, making: Making) -> list[tuple[str, str]]:
    """What each command does, and the command."""
    folder = run.path.parent
    student, recipe = shlex.quote(str(run.path)), shlex.quote(str(folder / "recipe.yaml"))
    root = shlex.join(["--data-root", str(making.data_root)])
    both = shlex.join(["--runs", str(making.runs)]) + f" {root}"
    return [
        ("This report", making.command),
        ("Train the student again, with every setting written out", f"comkd distill {recipe} {root} --runs runs-again"),
        ("Score it beside its teacher", f"comkd evaluate {student} {both}"),
        ("Export it, with latency", f"comkd export --onnx --benchmark {student} {both}"),
    ]


def settings(run: ScoredRun) -> str:
    """The whole recipe as YAML."""
    return to_yaml(run.facts.recipe)


def _origin(run: ScoredRun) -> Iterator[tuple[str, str]]:
    facts, recipe = run.facts, run.facts.recipe
    data = (facts.identity_parts or {}).get("data", {})
    yield "Student", f"{run.path} ({_megabytes(run.path)})"
    yield "its weights", f"sha256 {run.student.sha256}"
    yield "its backbone", _model_text(facts.backbone.architecture, facts.backbone.weights)
    yield "Teacher", run.teacher.name if run.teacher else _model_text(recipe.teacher.arch, recipe.teacher.weights)
    yield "its weights ", f"digest {run.teacher.sha256}" if run.teacher else "not found when the report was made"
    yield "Recipe", f"{facts.recipe_name}: {recipe.about}" if recipe.about else facts.recipe_name
    yield "identity of the run", f"sha256 {facts.identity}"
    yield "Data", f"{run.dataset}, {len(run.class_names)} classes, prompt “{facts.template}”"
    yield "training images", f"{run.training_images:,}" + _digest(data.get("training_images"))
    yield "scored images", f"{len(run.images):,}" + _digest(run.images.digest)
    yield (
        "Versions when the report was made",
        ", ".join(f"{name} {version(name)}" for name in VERSIONS) + (f", Python {platform.python_version()}"),
    )


def _picture(run: ScoredRun, index: int, note: str) -> Picture:
    truth = None if run.images.labels is None else run.images.labels[index]
    given = [_answer(run, role, model, index, truth) for role, model in run.models]
    return Picture(
        key=run.images.keys[index].rpartition("/")[2],
        source=thumbnail(run.images, index),
        label=None if truth is None else run.class_names[truth],
        answers=[answer for answer in given if answer is not None],
        note=note,
    )


def _answer(run: ScoredRun, who: str, model: ScoredModel, index: int, truth: int | None) -> Answer | None:
    rows = np.flatnonzero(model.answers.indices == index)
    if not len(rows):
        return None
    label = int(model.answers.predicted[rows[0]])
    right = None if truth is None else label == truth
    return Answer(who, run.class_names[label], f"{model.answers.confidence[rows[0]]:.0%}", right)


def _model_text(architecture: str | None, weights: str | None) -> str:
    return f"{architecture or 'inline model'}, {weights or 'random weights'}"


def _digest(value: object) -> str:
    return f", sha256 {value}" if value else ""


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.2f} MB"
