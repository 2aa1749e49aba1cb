"""Images of a run, as features of its student, on which class vectors are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from comkd_cli.data.loaders import worker_count
from comkd_cli.data.sources import reopen_source
from comkd_cli.errors import DataError
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.evaluation.features import FeatureStore
from comkd_cli.evaluation.subjects import live_student
from comkd_cli.events import Notice, Report
from comkd_cli.method.student import Student
from comkd_cli.models.checkpoints import StudentRecord

MOST_IMAGES = 2000


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images that the student was not trained on."""

    features: np.ndarray
    """float32 (images, dim), L2-normalised."""
    labels: np.ndarray | None
    """int64 (images,)."""


def read_image_features(
    student: Student, record: StudentRecord, data_root: Path, runs: Path, device: torch.device, report: Report
) -> ImageFeatures | None:
    """Features of up to MOST_IMAGES test images of a run; None, with a notice, if it has none on this machine."""
    try:
        source = reopen_source(record.recipe.data, record.holdout, data_root, runs, report)
        check_classes(record, source, report)
    except DataError as error:
        report(Notice(f"the class vectors are not compared on images: {error}"))
        return None
    images = source.test
    if images is None or not len(images):
        report(Notice(f"the class vectors are not compared on images: {source.name} has no test images"))
        return None
    if len(images) > MOST_IMAGES:
        images = images.subset(np.linspace(0, len(images) - 1, MOST_IMAGES).astype(int).tolist())
    subject = live_student(student, record.preprocessing, device)
    found = FeatureStore(None, device, worker_count(record.recipe.data), report).features(
        subject.encoder, images, "images"
    )
    if not len(found.indices):
        return None
    labels = None if images.labels is None else np.asarray(images.labels)[found.indices]
    return ImageFeatures(subject.features(found.values, range(len(record.class_names))).numpy(), labels)
