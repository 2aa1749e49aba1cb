"""The protocols that follow from the features of the test images alone: zero-shot and base-to-novel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.splits import halves
from comkd_cli.evaluation.features import Features
from comkd_cli.evaluation.metrics import mean_per_class_percent, top1_percent
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.results.records import Record


@dataclass(frozen=True)
class Evaluation:
    """A subject with its features of the images that it is scored on: every protocol is derived from these."""

    subject: Subject
    source: Source
    images: ImageSet
    test: Features
    """Of `images`."""

    @property
    def labels(self) -> np.ndarray:
        """The labels of the images that could be read, (images,); only for images with labels."""
        labels: np.ndarray = np.asarray(self.images.labels)[self.test.indices]
        return labels


@dataclass(frozen=True)
class Scored:
    """A subject's answers on the test images, and the record of them."""

    record: Record
    predicted: np.ndarray
    """(images,) labels, of the images that could be read."""


def zero_shot(evaluation: Evaluation) -> Scored:
    """All classes, by their class vectors; without labels, only the answers."""
    subject, source, images, test = evaluation.subject, evaluation.source, evaluation.images, evaluation.test
    predicted = subject.predict(test.values, range(len(source.class_names)))
    labels = None if images.labels is None else evaluation.labels
    record = Record(
        model=subject.model,
        role=subject.role,
        dataset=source.name,
        top1_percent=None if labels is None else top1_percent(predicted, labels),
        mean_per_class_percent=None if labels is None else mean_per_class_percent(predicted, labels),
        images=len(predicted),
        image_tower_parameters=subject.parameters,
        seed=subject.seed,
        unreadable=len(test.unreadable),
        selection=subject.selection,
        model_sha256=subject.encoder.identity,
        images_sha256=images.digest,
        images_from="training" if source.test is None else "test" if source.holdout is None else "held-out",
    )
    return Scored(record, predicted)


def base_to_novel(evaluation: Evaluation) -> list[Record]:
    """Each half of the classes, on its own images and with only its own classes as possible answers."""
    whole, labels = zero_shot(evaluation).record, evaluation.labels
    records = []
    for half in ("base", "new"):
        classes: Sequence[int] = halves(len(evaluation.source.class_names))[half]
        inside = np.isin(labels, classes)
        if not inside.any():
            continue
        predicted = evaluation.subject.predict(evaluation.test.values[inside], classes)
        records.append(
            replace(
                whole,
                protocol="base-to-novel",
                classes=half,
                top1_percent=top1_percent(predicted, labels[inside]),
                mean_per_class_percent=mean_per_class_percent(predicted, labels[inside]),
                images=int(inside.sum()),
            )
        )
    return records
