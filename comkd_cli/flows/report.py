"""The report of runs: listens while they are scored, and writes one HTML page of what was seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.evaluation.answers import Observation, answers, distances
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.events import Event, Notice, Report
from comkd_cli.files import write_text
from comkd_cli.models.checkpoints import load_student_record
from comkd_cli.models.costs import multiply_adds
from comkd_cli.report.details import Making
from comkd_cli.report.run import ScoredModel, ScoredRun
from comkd_cli.results.curve import read_curve
from comkd_cli.results.records import Results
from comkd_cli.runtime import ranks

NAME = "report.html"
MANIFEST = Path("bundle", "manifest.json")


class RunCollector:
    """Collects the runs that an evaluation scores: its events, its models' answers, and where each run ends.

    Give `report`, `observe` and `closing()` to the evaluation. What a run keeps grows with the images, not with the
    classes.
    """

    def __init__(self, report: Report) -> None:
        self.runs: list[ScoredRun] = []
        self._report = report
        self._notices: list[str] = []
        self._student: Observation | None = None
        self._teacher: Observation | None = None

    def report(self, event: Event) -> None:
        """Pass an event on; notices are kept for the run at hand."""
        if isinstance(event, Notice):
            self._notices.append(event.text)
        self._report(event)

    def observe(self, seen: Observation) -> None:
        """Take a model that was scored: a student, then its teacher. Plain CLIPs are not runs."""
        if not ranks.is_main():
            return
        if seen.evaluation.subject.role == "student":
            self._student, self._teacher = seen, None
        elif seen.evaluation.subject.role == "teacher":
            self._teacher = seen

    def closing(self, keep: Callable[[Results], None] = lambda found: None) -> Callable[[Results], None]:
        """What the evaluation calls with the results of each run: keeps them, and ends the run at hand.

        Of several processes the main one keeps and collects.
        """

        def close(found: Results) -> None:
            if ranks.is_main():
                keep(found)
                self._close(found)

        return close

    def _close(self, found: Results) -> None:
        if self._student is not None:
            problems = [f"The teacher could not be scored: {entry.line}" for entry in found.missing]
            self.runs.append(_scored_run(self._student, self._teacher, (*self._notices, *problems)))
        self._student = self._teacher = None
        self._notices = []

    def write(self, path: Path, making: Making) -> None:
        """Write the page of the collected runs. Raises WriteError."""
        from comkd_cli.report.page import render  # imports matplotlib, which plain CLIPs need not wait for

        write_text(path, render(self.runs, making))


def _scored_run(student: Observation, teacher: Observation | None, notices: tuple[str, ...]) -> ScoredRun:
    path = Path(student.evaluation.subject.model)
    facts = load_student_record(path)
    source, images = student.evaluation.source, student.evaluation.images
    trained = (facts.identity_parts or {}).get("data", {}).get("training_images")
    return ScoredRun(
        path=path,
        facts=facts,
        dataset=source.name,
        class_names=source.class_names,
        images=images,
        training_images=len(source.train),
        student=_scored_model(student),
        teacher=None if teacher is None else _scored_model(teacher),
        distances=None if teacher is None else distances(student, teacher),
        learned_test_images=trained_on(trained, source, images),
        unreadable=student.evaluation.test.unreadable,
        notices=notices,
        history=read_curve(path.parent),
        manifest=_manifest(path.parent / MANIFEST),
    )


def trained_on(trained: str | None, source: Source, images: ImageSet) -> bool:
    """Whether images that a student is scored on are those that it was trained on.

    trained: the digest of its training images, as student.pt records it; None if it does not. source: what the
    images are from; if it has no test images, they are its training images or some of them.
    """
    no_test_images = source.test is None or not len(source.test)
    return trained is not None and trained in (images.digest, source.train.digest if no_test_images else None)


def _scored_model(seen: Observation) -> ScoredModel:
    subject = seen.evaluation.subject
    size = subject.encoder.preprocessing.size
    return ScoredModel(
        name=subject.model,
        sha256=subject.encoder.identity,
        parameters=subject.parameters,
        multiply_adds=_multiply_adds(subject, size),
        image_size=size,
        answers=answers(seen),
    )


def _multiply_adds(subject: Subject, size: int) -> int | None:
    try:
        return multiply_adds(subject.module, size)
    except (RuntimeError, NotImplementedError):  # some timm towers compute what the meta device cannot
        return None


def _manifest(path: Path) -> Mapping[str, Any] | None:
    """The manifest of a bundle; None if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
