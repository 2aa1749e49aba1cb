"""The report's tables of scores and costs, of one run or of several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comkd_cli.evaluation.metrics import mean_per_class_percent, top1_percent
from comkd_cli.report.run import ScoredModel, ScoredRun, right_on_common, same_images
from comkd_cli.report.statistics import (
    Interval,
    calibration,
    difference_interval,
    mean_per_class_interval,
    share_interval,
)

BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Measure:
    """A number as the page shows it, with its exact value and, if it was estimated, its interval."""

    value: float
    text: str
    interval: Interval | None = None
    name: str = ""
    """Of the field of results.json that holds the same value."""

    @property
    def interval_text(self) -> str:
        """`96.1 to 98.9`, or nothing."""
        return "" if self.interval is None else _minus(f"{self.interval.low:.1f} to {self.interval.high:.1f}")


@dataclass(frozen=True)
class ScoreRow:
    """A model with its scores and costs."""

    key: str
    """Its number or letter in figures and other tables."""
    name: str
    about: str
    role: str
    model: ScoredModel
    top1: Measure | None
    mean_per_class: Measure | None
    agreement: Measure | None
    calibration_error: Measure | None
    parameters: Measure
    multiply_adds: Measure | None
    latency: Measure | None

    @property
    def score(self) -> Measure | None:
        """The one that the row is compared by."""
        return self.top1 or self.agreement


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another on the same images."""

    name: str
    points: Measure
    sentence: str


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    head: str
    measure: Measure
    note: str


@dataclass(frozen=True)
class Compared:
    """Several runs beside each other."""

    rows: Sequence[ScoreRow]
    differences: Sequence[Difference] = field(default_factory=tuple)


def percent(value: float, interval: Interval | None = None, name: str = "") -> Measure:
    """A percentage with two decimals."""
    return Measure(value, f"{value:.2f} %", interval, name)


def count(value: int, name: str = "") -> Measure:
    """A whole number with its thousands apart."""
    return Measure(value, f"{value:,}", name=name)


def score_row(run: ScoredRun, role: str, model: ScoredModel, key: str, name: str = "") -> ScoreRow:
    """The scores and costs of a run's student or teacher."""
    top1 = per_class = error = agreement = None
    if run.labelled:
        predicted, labels = run.against_reference(model)
        right = predicted == labels
        top1 = percent(top1_percent(predicted, labels), share_interval(right), "top1_percent")
        spread = mean_per_class_interval(predicted, labels)
        per_class = percent(mean_per_class_percent(predicted, labels), spread, "mean_per_class_percent")
        error = percent(calibration(model.answers.confidence, right).expected_error_percent)
    if role == "student" and run.agreement is not None:
        agreement = percent(run.agreement[0], share_interval(run.agreement[1]), "agreement_percent")
    return ScoreRow(
        key=key,
        name=name or role,
        about=_about(run, role),
        role=role,
        model=model,
        top1=top1,
        mean_per_class=per_class,
        agreement=agreement,
        calibration_error=error,
        parameters=count(model.parameters, "image_tower_parameters"),
        multiply_adds=None if model.multiply_adds is None else _giga(model.multiply_adds),
        latency=fastest_latency(run.manifest) if role == "student" else None,
    )


def compared(runs: Sequence[ScoredRun]) -> Compared:
    """A row for each student and, once, for each teacher; and the first run against each other one."""
    students = [score_row(run, "student", run.student, str(number), run.name) for number, run in enumerate(runs, 1)]
    found = {(run.teacher.sha256, run.images.digest): (run, run.teacher) for run in runs if run.teacher is not None}
    teachers = [
        score_row(run, "teacher", teacher, f"T{number}", teacher.name)
        for number, (run, teacher) in enumerate(found.values(), 1)
    ]
    first = runs[0]
    differences = [
        _between(first, other, number)
        for number, other in enumerate(runs[1:], start=2)
        if first.labelled and same_images(first, other)
    ]
    return Compared([*students, *teachers], differences)


def against_teacher(run: ScoredRun) -> Difference | None:
    """The student minus its teacher on labelled images."""
    if run.teacher is None or not run.labelled:
        return None
    mine, theirs = right_on_common(run, run.student, run.teacher)
    return Difference("student minus teacher", _points(mine, theirs), "")


def tiles(run: ScoredRun, rows: Sequence[ScoreRow]) -> list[Tile]:
    """The headline numbers of a run. rows: of its student and, if it was found, its teacher."""
    student, teacher = rows[0], rows[1] if len(rows) > 1 else None
    made: list[Tile] = []
    if student.top1 is not None:
        made.append(Tile("Top-1", student.top1, f"{len(student.model.answers.indices):,} test images"))
    if student.top1 and teacher and teacher.top1 and teacher.top1.value:
        kept = 100 * student.top1.value / teacher.top1.value
        made.append(Tile("Retained from teacher", Measure(kept, f"{kept:.1f} %"), f"its top-1: {teacher.top1.text}"))
    if student.agreement is not None:
        made.append(Tile("Agreement", student.agreement, "same answer as the teacher"))
    made.append(
        Tile("Parameters", student.parameters, _ratio(student.parameters, teacher.parameters if teacher else None))
    )
    if student.multiply_adds is not None:
        less = _ratio(student.multiply_adds, teacher.multiply_adds if teacher else None)
        made.append(Tile("Multiply-adds", student.multiply_adds, less or "for one image"))
    if student.latency is not None:
        made.append(Tile("Latency", student.latency, student.latency.name))
    return made


def fastest_latency(manifest: Mapping[str, Any] | None) -> Measure | None:
    """The fastest graph of a bundle on one thread, as `comkd export --benchmark` measured it; named after it."""
    measured = [entry for entry in (manifest or {}).get("latency", []) if entry["threads"] == 1]
    graphs = [entry for entry in measured if entry["name"] != "pytorch"]
    if not graphs:
        return None
    best = min(graphs, key=lambda entry: float(entry["seconds"]))
    milliseconds = 1000 * float(best["seconds"])
    return Measure(milliseconds, f"{milliseconds:.3g} ms", name=f"{best['name']}, one image, one thread")


def weights_megabytes(model: ScoredModel) -> Measure:
    """The size of the image tower's weights in fp32."""
    megabytes = BYTES_PER_WEIGHT * model.parameters / 1e6
    return Measure(megabytes, f"{megabytes:,.3g} MB" if megabytes < 100 else f"{megabytes:,.0f} MB")


def _about(run: ScoredRun, role: str) -> str:
    if role == "teacher":
        method = run.facts.recipe.teacher.adapt.method
        return {"none": "as its weights are", "full": "trained on labels"}.get(method, f"adapted by {method}")
    if not run.distilled:
        return "trained on labels alone"
    return "distilled, with labels" if run.facts.recipe.loss.labels else "distilled without labels"


def _between(first: ScoredRun, other: ScoredRun, number: int) -> Difference:
    mine, theirs = right_on_common(first, first.student, other.student)
    points = _points(mine, theirs)
    sentence = ""
    if first.distilled != other.distilled:
        sign = 1 if first.distilled else -1
        gain = sign * points.value
        assert points.interval is not None
        ends = sorted(sign * end for end in (points.interval.low, points.interval.high))
        zero = "includes" if ends[0] <= 0 <= ends[1] else "excludes"
        sentence = _minus(
            f"Gain from the teacher: {gain:+.2f} points of top-1 over labels alone, on the same test images (95 % "
            f"interval {ends[0]:+.1f} to {ends[1]:+.1f}, which {zero} 0)."
        )
    return Difference(f"run 1 minus run {number}", points, sentence)


def _points(mine: np.ndarray, theirs: np.ndarray) -> Measure:
    value = 100 * (float(np.mean(mine)) - float(np.mean(theirs)))
    return Measure(value, _minus(f"{value:+.2f} points"), difference_interval(mine, theirs))


def _minus(text: str) -> str:
    """With the sign of typography before negative numbers; the hyphen of top-1 stays."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def _giga(multiply_adds: int) -> Measure:
    unit, size = ("G", 1e9) if multiply_adds >= 1e9 else ("M", 1e6)
    return Measure(multiply_adds, f"{multiply_adds / size:.3g} {unit}")


def _ratio(mine: Measure, theirs: Measure | None) -> str:
    return f"1/{theirs.value / mine.value:.1f} of the teacher's" if theirs and mine.value else ""
