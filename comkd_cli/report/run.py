"""A run as the report shows it: what was made from what, and what was answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.data.source import ImageSet
from comkd_cli.evaluation.answers import Answers, Distances
from comkd_cli.evaluation.metrics import agreement_percent
from comkd_cli.models.checkpoints import StudentRecord


@dataclass(frozen=True)
class ScoredModel:
    """A model, what it costs and what it answered."""

    name: str
    sha256: str
    """Of the weights that were scored, as `model_sha256` of results.json."""
    parameters: int
    """Of its image tower."""
    multiply_adds: int | None
    """For one image; None if they could not be counted."""
    image_size: int
    """Pixels, height and width of its input."""
    answers: Answers


@dataclass(frozen=True)
class ScoredRun:
    """A student and, if it was found, its teacher, on one set of images."""

    path: Path
    """student.pt."""
    facts: StudentRecord
    dataset: str
    class_names: tuple[str, ...]
    images: ImageSet
    training_images: int
    student: ScoredModel
    teacher: ScoredModel | None
    distances: Distances | None
    """Of student and teacher; None without a teacher."""
    learned_test_images: bool
    """Whether the images that it was scored on are those that it was trained on."""
    unreadable: tuple[str, ...]
    notices: tuple[str, ...]
    """What was reported while the run was scored."""
    history: Sequence[Mapping[str, Any]]
    """Of its training, an entry for each epoch."""
    manifest: Mapping[str, Any] | None
    """Of the bundle beside the student, or None."""

    @property
    def name(self) -> str:
        """`recipe on dataset, seed k`."""
        return f"{self.facts.recipe_name} on {self.dataset}, seed {self.facts.recipe.seed}"

    @property
    def distilled(self) -> bool:
        """Whether the student learned from its teacher's features, or from labels alone."""
        return self.facts.recipe.loss.needs_teacher

    @property
    def labelled(self) -> bool:
        """Whether the images have labels to compare answers with."""
        return self.images.labels is not None

    @property
    def models(self) -> list[tuple[str, ScoredModel]]:
        """The student and its teacher, with their roles."""
        return [("student", self.student), *([("teacher", self.teacher)] if self.teacher else [])]

    @cached_property
    def reference(self) -> np.ndarray:
        """int64 (images,): each image's label, or without labels the teacher's answer; -1 if there is neither."""
        if self.images.labels is not None:
            return np.asarray(self.images.labels, np.int64)
        known = np.full(len(self.images), -1, np.int64)
        if self.teacher is not None:
            known[self.teacher.answers.indices] = self.teacher.answers.predicted
        return known

    def against_reference(self, model: ScoredModel) -> tuple[np.ndarray, np.ndarray]:
        """A model's answers to the images that have a reference, and that reference, int64 (images,) each."""
        reference = self.reference[model.answers.indices]
        known = reference >= 0
        return model.answers.predicted[known], reference[known]

    @cached_property
    def agreement(self) -> tuple[float, np.ndarray] | None:
        """How often student and teacher agree, in percent, and on which images, bool; None without a teacher."""
        if self.teacher is None:
            return None
        _, mine, theirs = np.intersect1d(
            self.student.answers.indices, self.teacher.answers.indices, return_indices=True
        )
        if not len(mine):
            return None
        first, second = self.student.answers.predicted[mine], self.teacher.answers.predicted[theirs]
        return agreement_percent(first, second), first == second


def same_images(first: ScoredRun, second: ScoredRun) -> bool:
    """Whether two runs were scored on the same images with the same classes, so that they can be compared in pairs."""
    return (
        first.class_names == second.class_names
        and first.images.digest == second.images.digest
        and first.images.labels == second.images.labels
    )


def right_on_common(first: ScoredRun, mine: ScoredModel, other: ScoredModel) -> tuple[np.ndarray, np.ndarray]:
    """Which images both models have answered each has right, bool (images,) each; of labelled images."""
    labels = np.asarray(first.images.labels)
    common, left, right = np.intersect1d(mine.answers.indices, other.answers.indices, return_indices=True)
    truth = labels[common]
    return mine.answers.predicted[left] == truth, other.answers.predicted[right] == truth
