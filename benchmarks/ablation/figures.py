"""The figures of a finished student: accuracy, agreement with its teacher, calibration, and figures of its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from comkd_cli.bundles import calibration
from comkd_cli.data.folder import folder_source
from comkd_cli.data.loaders import worker_count
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.edge.images import Preprocessing
from comkd_cli.evaluation.features import Encoder, FeatureStore
from comkd_cli.evaluation.metrics import agreement_percent, top1_percent
from comkd_cli.models.checkpoints import StudentRecord, load_student
from comkd_cli.models.costs import multiply_adds, parameters
from comkd_cli.teachers.loading import ReadyTeacher, build_teacher, load_saved_teacher
from comkd_cli.teachers.of_student import teacher_file

CONFIDENCE = 0.95
CPU = torch.device("cpu")


class Scorer:
    """Scores students beside the study's teacher, whose answers are computed once for each set of images.

    weights: the teacher's, as recipes of the study name them.
    """

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._logits_of: dict[Path, np.ndarray] = {}

    def figures(self, student_file: Path, folder: Path) -> dict[str, Any]:
        """Of a student on the test images of a folder: percentages, gate, gradient shares, costs."""
        student, record = load_student(student_file)
        source = folder_source(folder, record.class_names, record.template)
        assert source.test is not None  # rows are scored on labelled images
        logits = _logits(lambda batch: student(batch).logits, record.preprocessing, source.test, record)
        teacher_logits = self._teacher_logits(student_file, folder, source, record)
        labels = np.asarray(source.test.labels)
        lines = [json.loads(line) for line in (student_file.parent / "metrics.jsonl").read_text().splitlines()]
        shares = [name for name in lines[-1] if name.endswith("_gradient_share")]
        return {
            "images": len(labels),
            "top1_percent": top1_percent(logits.argmax(axis=1), labels),
            "teacher_top1_percent": top1_percent(teacher_logits.argmax(axis=1), labels),
            "agreement_percent": agreement_percent(logits.argmax(axis=1), teacher_logits.argmax(axis=1)),
            "calibration_error_percent": calibration_error_percent(logits, labels),
            "teacher_calibration_error_percent": calibration_error_percent(teacher_logits, labels),
            "gate": student.gate,
            "gradient_shares": {
                name.removesuffix("_gradient_share"): float(np.mean([line[name] for line in lines])) for name in shares
            },
            "parameters": parameters(student),
            "multiply_adds": multiply_adds(student, record.preprocessing.size),
        }

    def novel_figures(self, student_file: Path, folder: Path) -> dict[str, Any]:
        """Of a student on the test images of classes that it was not trained on, by the teacher's class vectors."""
        student, record = load_student(student_file)
        source = folder_source(folder, None, record.template)
        assert source.test is not None
        vectors = self._teacher(student_file, source, record).teacher.class_vectors
        logits = _logits(lambda batch: student(batch, vectors).logits, record.preprocessing, source.test, record)
        teacher_logits = self._teacher_logits(student_file, folder, source, record)
        labels = np.asarray(source.test.labels)
        return {
            "novel_top1_percent": top1_percent(logits.argmax(axis=1), labels),
            "teacher_novel_top1_percent": top1_percent(teacher_logits.argmax(axis=1), labels),
        }

    def _teacher(self, student_file: Path, source: Source, record: StudentRecord) -> ReadyTeacher:
        if record.teacher is not None:  # a stage 1 adapted it
            return load_saved_teacher(teacher_file(record, student_file), source.class_names, CPU)
        settings = record.recipe.teacher.model_copy(update={"weights": str(self._weights)})
        return build_teacher(settings, source.class_names, record.prompts, CPU)

    def _teacher_logits(self, student_file: Path, folder: Path, source: Source, record: StudentRecord) -> np.ndarray:
        images = (folder / "test").resolve()
        if images not in self._logits_of:
            assert source.test is not None
            ready = self._teacher(student_file, source, record)
            self._logits_of[images] = _logits(
                lambda batch: ready.teacher(batch).logits, ready.preprocessing, source.test, record
            )
        return self._logits_of[images]


def _logits(
    model: Callable[[Tensor], Tensor], preprocessing: Preprocessing, images: ImageSet, record: StudentRecord
) -> np.ndarray:
    store = FeatureStore(None, CPU, worker_count(record.recipe.data), lambda _event: None)
    return store.features(Encoder("", preprocessing, model), images, "scoring").values


def calibration_error_percent(logits: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error of softmax(logits), in percent. logits: (images, classes); labels: (images,)."""
    return calibration.calibration_error_percent(special.softmax(logits.astype(np.float64), axis=1), labels)


def interval(differences: list[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of paired differences, by Student's t; None for fewer than two."""
    if len(differences) < 2:
        return None
    error = stats.sem(differences)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * error)
    mean = float(np.mean(differences))
    return mean - reach, mean + reach
