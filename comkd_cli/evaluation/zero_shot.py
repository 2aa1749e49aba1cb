"""A model's zero-shot score on the test images while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from comkd_cli.data.source import ImageSet, Source, evenly_spaced
from comkd_cli.data.unreadable import MOST_NAMED, check_unreadable
from comkd_cli.errors import DataError
from comkd_cli.evaluation.features import FeatureStore
from comkd_cli.evaluation.metrics import agreement_percent, top_answer
from comkd_cli.evaluation.protocols import Evaluation, base_to_novel, zero_shot
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.events import Notice, Report
from comkd_cli.results.tables import ONE_ANSWER_PERCENT

SELECTION_SCORE = "selection_score_percent"
MOST_FOR_TEACHER = 2_000
"""Held-out images that the teacher answers: the agreement is then known to 2.2 points."""


class Scorer:
    """Scores a model on the test images of a source, by the same code as `comkd evaluate`.

    Both compute in float32 whatever the precision of the training, so that their scores of the same weights agree.
    unreadable_limit_percent: the share of the test images that may be unreadable. The first score reports the first
    of them. teacher: its agreement with the model is also measured, only on held-out images; it runs once.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        workers: int,
        report: Report,
        unreadable_limit_percent: float,
        teacher: Subject | None = None,
    ) -> None:
        self._source = source
        # Without a folder, since the weights differ at the next call.
        self._store = FeatureStore(None, device, workers, report)
        self._report = report
        self._limit_percent = unreadable_limit_percent
        self._unreadable: tuple[str, ...] = ()
        self._teacher = teacher if source.holdout is not None else None
        self._images = self._images_to_score()
        self._answers: dict[int, int] | None = None

    def __call__(self, subject: Subject, select_on: Literal["all", "base"] | None = None) -> dict[str, float]:
        """{"test_top1_percent", "test_images", "test_unreadable"}; empty if no test image has a label.

        test_images: the number that were scored; test_unreadable: the number that could not be read. If none could be
        read, there is no top-1. With a teacher, "test_agreement_percent" is added; without labels, it replaces
        top-1; "teacher_top_answer_percent" stands beside it if nearly all of the teacher's answers are one class.
        select_on: adds SELECTION_SCORE, the top-1 on the test images of all classes, or of the base classes with only
        these as possible answers. Raises DataError beyond the limit of unreadable images, or if no image remains to
        select on.
        """
        images = self._images
        if images is None:
            return {}
        found = self._store.features(subject.encoder, images, "scoring")
        evaluation = Evaluation(subject, self._source, images, found)
        self._check(evaluation)
        figures: dict[str, float] = {"test_images": len(found.indices), "test_unreadable": len(found.unreadable)}
        if len(found.indices):
            scored = zero_shot(evaluation)
            if scored.record.top1_percent is not None:
                figures = {"test_top1_percent": scored.record.top1_percent, **figures}
            if self._teacher is not None:
                answers = dict(zip(found.indices.tolist(), scored.predicted.tolist(), strict=True))
                figures |= self._agreement(self._teacher, images, answers)
        if select_on is not None:
            figures[SELECTION_SCORE] = self._selection_score(evaluation, select_on)
        return figures

    def _images_to_score(self) -> ImageSet | None:
        """The test images; without labels only some of them, for the agreement; None if there are none to score."""
        images = self._source.test
        if images is None or not len(images) or (images.labels is None and self._teacher is None):
            return None
        if images.labels is not None or len(images) <= MOST_FOR_TEACHER:
            return images
        return images.subset(evenly_spaced(images, MOST_FOR_TEACHER))

    def _agreement(self, teacher: Subject, images: ImageSet, answers: Mapping[int, int]) -> dict[str, float]:
        """The agreement with the teacher on up to MOST_FOR_TEACHER of the images. answers: by index."""
        if self._answers is None:
            positions = sorted(evenly_spaced(images, MOST_FOR_TEACHER))
            chosen = images.subset(positions)
            found = self._store.features(teacher.encoder, chosen, "scoring the teacher")
            predicted = zero_shot(Evaluation(teacher, self._source, chosen, found)).predicted
            indices = np.asarray(positions)[found.indices].tolist()
            self._answers = dict(zip(indices, predicted.tolist(), strict=True))
        common = sorted(answers.keys() & self._answers.keys())
        if not common:
            return {}
        own, of_teacher = (np.array([given[index] for index in common]) for given in (answers, self._answers))
        _, share = top_answer(of_teacher)
        figures = {"test_agreement_percent": agreement_percent(own, of_teacher)}
        return figures if share < ONE_ANSWER_PERCENT else {**figures, "teacher_top_answer_percent": share}

    def _selection_score(self, evaluation: Evaluation, select_on: Literal["all", "base"]) -> float:
        records = []
        if len(evaluation.test.indices):
            records = [zero_shot(evaluation).record] if select_on == "all" else base_to_novel(evaluation)
        for record in records:
            if record.classes == select_on and record.top1_percent is not None:
                return record.top1_percent
        raise DataError(
            f"promptkd selects the epoch by the test images of {select_on} classes, but none of {self._source.name} "
            "could be read",
            field="selection",
            remedy="use selection: last",
        )

    def _check(self, evaluation: Evaluation) -> None:
        found, images = evaluation.test, evaluation.images
        check_unreadable(
            found.unreadable, len(images), self._limit_percent, f"{self._source.test_name} of {self._source.name}"
        )
        if found.unreadable != self._unreadable:
            self._unreadable = found.unreadable
            named = "".join(f"\n  {problem}" for problem in found.unreadable[:MOST_NAMED])
            self._report(
                Notice(
                    f"{len(found.unreadable)} of {len(images)} {self._source.test_name} could not be read and are not "
                    f"scored:{named}"
                )
            )
