"""Scores of a model on the test images of a dataset, by every protocol that applies to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.unreadable import MOST_NAMED, check_unreadable
from comkd_cli.errors import DataError
from comkd_cli.evaluation.answers import Observation
from comkd_cli.evaluation.features import Encoder, FeatureStore
from comkd_cli.evaluation.few_shot import Draws, few_shot
from comkd_cli.evaluation.metrics import agreement_percent, top_answer
from comkd_cli.evaluation.protocols import Evaluation, base_to_novel, zero_shot
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.results.records import Record
from comkd_cli.results.tables import VARIANTS

IMAGENET_FAMILY = tuple(name for name, dataset in CATALOG.items() if dataset.layout.startswith("imagenet"))
MOST_FOR_AGREEMENT = 50_000  # training images to compare answers on: more would change the share by under 0.5 points


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one dataset."""

    records: list[Record]
    answers: dict[int, int]
    """The zero-shot answer to each image that could be read, by its index."""


@dataclass(frozen=True)
class DatasetScorer:
    """The images of a dataset that models are scored on, and the protocols to score them by."""

    source: Source
    images: ImageSet
    store: FeatureStore
    protocols: Sequence[str]
    draws: Draws
    """Of the few-shot protocol."""
    unreadable_limit_percent: float
    on_scored: Callable[[Observation], None] = lambda seen: None
    """Called with each model that was scored on all classes, and its answers."""

    def score(self, subject: Subject) -> Scores:
        """The records of each protocol that applies. Raises DataError if too few images could be read."""
        name, report = self.source.name, self.store.report
        report(Stage(f"Scoring {subject.role} {subject.model} on {len(self.images)} {self.images_name} of {name}"))
        evaluation = self.evaluation(subject)
        test = evaluation.test
        if not len(test.indices):
            raise DataError(f"{name}: none of the {len(self.images)} images could be read")
        check_unreadable(test.unreadable, len(self.images), self.unreadable_limit_percent, f"images of {name}")
        if subject.role != "teacher":  # which reads the same files as its student
            _report_unreadable(test.unreadable, report)
        scored = zero_shot(evaluation)
        self.on_scored(Observation(evaluation, scored.predicted))
        records = [replace(scored.record, protocol=protocol) for protocol in self._of_all_classes()]
        if self.images.labels is not None:
            if "base-to-novel" in self.protocols and name not in VARIANTS:
                records += base_to_novel(evaluation)
            if "few-shot" in self.protocols and self.source.train.labels:
                records += few_shot(evaluation, self.store, self.draws, self.unreadable_limit_percent)
        answers = dict(zip(test.indices.tolist(), scored.predicted.tolist(), strict=True))
        return Scores(records, answers)

    def beside(self, encoders: Sequence[Encoder]) -> DatasetScorer:
        """The scorer where features of these models are computed in the same pass over the images as another's."""
        return replace(self, store=replace(self.store, companions=tuple(encoders)))

    @property
    def images_name(self) -> str:
        """What messages call the images that are scored."""
        return "images" if self.source.holdout is None else self.source.test_name

    def evaluation(self, subject: Subject) -> Evaluation:
        """The subject with its features of the images."""
        label = f"scoring {subject.role} on {self.source.name}"
        features = self.store.features(subject.encoder, self.images, label)
        return Evaluation(subject, self.source, self.images, features)

    def _of_all_classes(self) -> list[str]:
        """The protocols that score all classes on all test images at once, as far as they apply to the dataset."""
        name = self.source.name
        applies = {
            "zero-shot": True,
            "cross-dataset": name in CATALOG and name not in IMAGENET_FAMILY,
            "domain-generalization": name in VARIANTS,
        }
        return [protocol for protocol in self.protocols if applies.get(protocol, False)]


def images_to_score(source: Source, report: Report) -> ImageSet:
    """The test images, or if there are none, the training images without labels, only for agreement."""
    if source.test is not None and len(source.test):
        if source.test.labels is None:
            report(Notice(f"the {source.test_name} of {source.name} have no labels: only agreement can be measured"))
            # A test split is scored whole; a share of very many images need not be.
            return source.test if source.holdout is None else _some_of(source.test, report)
        return source.test
    report(
        Notice(
            f"{source.name} has no test images: only agreement with the teacher is measured, on the training images "
            "(not held out, labels ignored)"
        )
    )
    return replace(_some_of(source.train, report), labels=None)


def _some_of(images: ImageSet, report: Report) -> ImageSet:
    """Up to about MOST_FOR_AGREEMENT of the images, evenly spaced."""
    if len(images) <= MOST_FOR_AGREEMENT:
        return images
    chosen = list(images.spaced(MOST_FOR_AGREEMENT))
    report(Notice(f"agreement is measured on {len(chosen):,} of {len(images):,} images, evenly spaced"))
    return images.subset(chosen)


@dataclass(frozen=True)
class Agreement:
    """The agreement of a student with its teacher, on the images that both have answered."""

    percent: float
    top_answer: int
    """The class that the teacher answers most often."""
    top_answer_percent: float
    """Its share of the teacher's answers: if it is large, any student that learned it agrees."""

    def added_to(self, records: Sequence[Record], top_answer: str) -> list[Record]:
        """The student's records with the agreement on those of all classes. top_answer: the name of that class."""
        return [
            replace(
                record,
                agreement_percent=self.percent,
                teacher_top_answer=top_answer,
                teacher_top_answer_percent=self.top_answer_percent,
            )
            if record.classes == "all"
            else record
            for record in records
        ]


def agreement_of(student: Scores, teacher: Scores) -> Agreement:
    """The agreement of a student with its teacher. Raises ValueError if no image has an answer of both."""
    common = sorted(student.answers.keys() & teacher.answers.keys())
    if not common:
        raise ValueError("no image was answered by both models")
    own, of_teacher = (np.array([scores.answers[index] for index in common]) for scores in (student, teacher))
    return Agreement(agreement_percent(own, of_teacher), *top_answer(of_teacher))


def _report_unreadable(problems: Sequence[str], report: Report) -> None:
    if problems:
        named = "".join(f"\n  {problem}" for problem in problems[:MOST_NAMED])
        count = len(problems)
        report(Notice(f"{count} {'image' if count == 1 else 'images'} could not be read and were skipped:{named}"))
