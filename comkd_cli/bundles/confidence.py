"""How far a bundle's answers can be trusted: fits the temperature and the threshold, and measures both on the gate.

Nothing is fitted on the gate's images, and no figure is of the images of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.bundles.calibration import (
    calibration_error_percent,
    class_thresholds,
    fit_temperature,
    fit_threshold,
    least_images,
    score_negatives,
)
from comkd_cli.bundles.parts import Part
from comkd_cli.edge.images import prepare
from comkd_cli.edge.threshold import SCORE, Confidence
from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.evaluation.metrics import wilson_interval_percent
from comkd_cli.events import Notice, Progress, Report, Stage
from comkd_cli.method.student import Student
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.teachers.loading import ReadyTeacher
from comkd_cli.teachers.of_student import teacher_of_student

TEACHER_IMAGES = 256  # of each part: a large teacher takes a second for each on a CPU
TEACHER_BATCH = 32


@dataclass(frozen=True)
class Answered:
    """A part and the student's answers to it in PyTorch."""

    part: Part
    logits: np.ndarray
    """float32 (images, classes)."""


def top1_of(answered: Sequence[Answered]) -> tuple[float, int] | None:
    """The top-1 of the student on parts, in percent, and the number of their images; None without labels."""
    if any(found.part.labels is None for found in answered):
        return None
    right = np.concatenate([found.logits.argmax(axis=1) == found.part.labels for found in answered])
    return float(100 * right.mean()), len(right)


class StudentsTeacher:
    """The teacher of a student, loaded when it is first needed."""

    def __init__(
        self, student_file: Path, student: Student, record: StudentRecord, allow_download: bool, report: Report
    ) -> None:
        self._file, self._student, self._record = student_file, student, record
        self._allow_download, self._report = allow_download, report
        self._ready: ReadyTeacher | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def probabilities(self, part: Part) -> np.ndarray:
        """Its probabilities, float64 (images, classes), for the first TEACHER_IMAGES of a part.

        Raises CheckpointError or ModelError if it could not be loaded, or the student has none.
        """
        teacher = self._load()
        assert part.pictures is not None  # of every part that was read
        count = min(TEACHER_IMAGES, len(part.pictures))
        self._report(Stage(f"Running the teacher on {count} images"))
        found = []
        for start in range(0, count, TEACHER_BATCH):
            opened = [part.pictures.open(i) for i in range(start, min(start + TEACHER_BATCH, count))]
            images = np.stack([prepare(image, teacher.preprocessing) for image in opened])
            with torch.inference_mode():
                logits = teacher.teacher(torch.from_numpy(images).to(self._device)).logits
                found.append(logits.double().softmax(dim=1).cpu().numpy())
            self._report(Progress("teacher", start + len(opened), count))
        return np.concatenate(found)

    def _load(self) -> ReadyTeacher:
        if not self._record.recipe.loss.needs_teacher:
            raise CheckpointError("was trained on labels, without a teacher", path=self._file)
        if self._ready is None:
            ready = teacher_of_student(
                self._file, self._student, self._record, self._device, self._allow_download, self._report
            )
            self._ready = replace(ready, teacher=ready.teacher.to(self._device))
        return self._ready


@dataclass(frozen=True)
class FittedConfidence:
    """A temperature and a threshold, and their entries in the manifest."""

    confidence: Confidence
    class_names: Sequence[str]
    calibration: Mapping[str, Any]
    threshold: Mapping[str, Any]
    gate: Answered
    expected: np.ndarray | None
    """int (images,), what the first images of the gate should be answered: their labels, or the teacher's answers. None
    without both."""

    def figures(self, logits: np.ndarray) -> dict[str, Any]:
        """How far the probabilities of a graph hold on the gate. logits: float32 (images, classes), the graph's."""
        probabilities = self.confidence.probabilities(logits)
        figures: dict[str, Any] = {
            "calibration_error_percent": None,
            "accepted_percent": None,
            "accepted_interval_percent": None,
        }
        if self.expected is not None:
            count = len(self.expected)
            figures["calibration_error_percent"] = calibration_error_percent(probabilities[:count], self.expected)
        if self.confidence.threshold is not None:
            share = float(100 * self.confidence.accepted(probabilities, self.class_names).mean())
            different = self.gate.part.different or len(logits)
            figures["accepted_percent"] = share
            figures["accepted_interval_percent"] = wilson_interval_percent(share, different)
        return figures

    def with_negatives(self, logits: np.ndarray) -> FittedConfidence:
        """The same, with figures of images of none of the classes. logits: (images, classes), the student's."""
        own, others = (self.confidence.probabilities(found) for found in (self.gate.logits, logits))
        accepted = self.confidence.accepted(others, self.class_names)
        found = score_negatives(own.max(axis=1), others.max(axis=1), accepted)
        return replace(self, threshold={**self.threshold, "negatives": asdict(found)})


class ConfidenceFitter:
    """Fits temperature and threshold of a student.

    class_names: as classes.txt has them. accept_percent: of unseen images, that the threshold accepts.
    """

    def __init__(
        self, class_names: Sequence[str], accept_percent: float, teacher: StudentsTeacher, report: Report
    ) -> None:
        self._class_names, self._accept = class_names, accept_percent
        self._teacher, self._report = teacher, report
        self._problem: str | None = None
        """Why the teacher gave no answers."""

    def fit(self, gate: Answered, unseen: Answered | None, no_fit: str | None) -> FittedConfidence:
        """gate: measured on. unseen: fitted on; None keeps T = 1 and no threshold, for the reason `no_fit`."""
        expected = None if unseen is None else self._targets(gate)
        temperature, document = 1.0, self._unfitted(no_fit)
        if unseen is not None:
            temperature, document = self._temperature(unseen)
        confidence, threshold = Confidence(temperature), self._no_threshold(no_fit)
        if unseen is not None:
            confidence, threshold = self._threshold(confidence, unseen)
        expected = expected.argmax(axis=1) if expected is not None and expected.ndim == 2 else expected
        errors: list[float | None] = [None, None]
        if expected is not None:
            logits = gate.logits[: len(expected)]
            scales = (Confidence(), confidence)
            errors = [calibration_error_percent(scale.probabilities(logits), expected) for scale in scales]
        calibration = {
            **document,
            "error_of": None if expected is None else "labels" if gate.part.labels is not None else "teacher",
            "error_images": None if expected is None else len(expected),
            "error_before_percent": errors[0],
            "error_after_percent": errors[1],
        }
        for what, fitted in (("temperature", calibration), ("threshold", threshold)):
            if fitted["reason"] is not None:
                self._report(Notice(f"no {what} is fitted: {fitted['reason']}"))
        return FittedConfidence(confidence, self._class_names, calibration, threshold, gate, expected)

    def _targets(self, answered: Answered) -> np.ndarray | None:
        """The labels of a part, else the teacher's probabilities for its first images; None without both."""
        if answered.part.labels is not None:
            return np.asarray(answered.part.labels)
        if self._problem is not None:
            return None
        try:
            return self._teacher.probabilities(answered.part)
        except (CheckpointError, ModelError) as error:
            self._problem = f"the images have no labels, and the teacher gave no answers: {error}"
            return None

    def _temperature(self, unseen: Answered) -> tuple[float, dict[str, Any]]:
        targets = self._targets(unseen)
        if targets is None:
            return 1.0, self._unfitted(self._problem)
        found = fit_temperature(unseen.logits[: len(targets)], targets)
        if found is None:
            return 1.0, self._unfitted(
                f"it cannot be determined from {len(targets)} images, because nearly all answers are right, or nearly "
                "none is better than chance"
            )
        fitted_to = "labels" if unseen.part.labels is not None else "teacher"
        return found, {"temperature": found, "fitted_to": fitted_to, "images": len(targets), "reason": None}

    def _threshold(self, confidence: Confidence, unseen: Answered) -> tuple[Confidence, dict[str, Any]]:
        probabilities = confidence.probabilities(unseen.logits)
        value = fit_threshold(probabilities.max(axis=1), self._accept)
        if value is None:
            return confidence, self._no_threshold(
                f"--accept {self._accept:g} needs at least {least_images(self._accept)} unseen images in addition to "
                f"the gate's, but only {len(probabilities)} are available; lower --accept"
            )
        by_class = class_thresholds(probabilities, self._class_names, self._accept)
        document = {
            **self._no_threshold(None),
            "value": value,
            "images": len(probabilities),
            "classes": by_class,
        }
        return replace(confidence, threshold=value, by_class=by_class), document

    def _unfitted(self, reason: str | None) -> dict[str, Any]:
        return {"temperature": 1.0, "fitted_to": None, "images": 0, "reason": reason}

    def _no_threshold(self, reason: str | None) -> dict[str, Any]:
        return {
            "score": SCORE,
            "value": None,
            "accept_percent": self._accept,
            "images": 0,
            "classes": {},
            "negatives": None,
            "reason": reason,
        }
