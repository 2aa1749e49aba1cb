"""A model's zero-shot score on the test images while it trains."""

from __future__ import annotations

from typing import Literal

import torch

from comkd_cli.data.source import Source
from comkd_cli.data.unreadable import MOST_NAMED, check_unreadable
from comkd_cli.errors import DataError
from comkd_cli.evaluation.features import FeatureStore
from comkd_cli.evaluation.protocols import Evaluation, base_to_novel, zero_shot
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.events import Notice, Report

SELECTION_SCORE = "selection_score_percent"


class Scorer:
    """Scores a model on the test images of a source, by the same code as `comkd evaluate`.

    Both compute in float32 whatever the precision of the training, so that their scores of the same weights agree.
    unreadable_limit_percent: the share of the test images that may be unreadable. The first score reports the first
    of them.
    """

    def __init__(
        self, source: Source, device: torch.device, workers: int, report: Report, unreadable_limit_percent: float
    ) -> None:
        self._source = source
        # Without a folder, since the weights differ at the next call.
        self._store = FeatureStore(None, device, workers, report)
        self._report = report
        self._limit_percent = unreadable_limit_percent
        self._unreadable: tuple[str, ...] = ()

    def __call__(self, subject: Subject, select_on: Literal["all", "base"] | None = None) -> dict[str, float]:
        """{"test_top1_percent", "test_images", "test_unreadable"}; empty where no test image has a label.

        test_images: the number that were scored; test_unreadable: the number that could not be read. If none could be
        read, there is no top-1. select_on: adds SELECTION_SCORE, the top-1 on the test images of all classes, or of
        the base classes with only these as possible answers. Raises DataError beyond the limit of unreadable images,
        or where no image remains to select on.
        """
        images = self._source.test
        if images is None or images.labels is None or not len(images):
            return {}
        found = self._store.features(subject.encoder, images, "scoring")
        evaluation = Evaluation(subject, self._source, images, found)
        self._check(evaluation)
        figures: dict[str, float] = {"test_images": len(found.indices), "test_unreadable": len(found.unreadable)}
        if len(found.indices):
            record = zero_shot(evaluation).record
            assert record.top1_percent is not None  # since the images have labels
            figures = {"test_top1_percent": record.top1_percent, **figures}
        if select_on is not None:
            figures[SELECTION_SCORE] = self._selection_score(evaluation, select_on)
        return figures

    def _selection_score(self, evaluation: Evaluation, select_on: Literal["all", "base"]) -> float:
        records = []
        if len(evaluation.test.indices):
            records = [zero_shot(evaluation).record] if select_on == "all" else base_to_novel(evaluation)
        for record in records:
            if record.classes == select_on and record.top1_percent is not None:
                return record.top1_percent
        raise DataError(
            f"promptkd selects the epoch by the test images of {select_on} classes, and none of {self._source.name} "
            "could be read",
            field="selection",
            remedy="use selection: last",
        )

    def _check(self, evaluation: Evaluation) -> None:
        found, images = evaluation.test, evaluation.images
        check_unreadable(found.unreadable, len(images), self._limit_percent, f"test images of {self._source.name}")
        if found.unreadable != self._unreadable:
            self._unreadable = found.unreadable
            named = "".join(f"\n  {problem}" for problem in found.unreadable[:MOST_NAMED])
            self._report(
                Notice(
                    f"{len(found.unreadable)} of {len(images)} test images could not be read and are not scored:{named}"
                )
            )
