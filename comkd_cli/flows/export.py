"""From a student to a bundle whose graphs answer as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.checkpoints import load_student
from comkd_cli.data.folder import images_below
from comkd_cli.data.source import ImageSet
from comkd_cli.data.sources import open_source
from comkd_cli.errors import DataError, ExportError
from comkd_cli.files import folder_written_whole
from comkd_cli.packaging.bundle import CLASSIFIER, ENCODER, complete_bundle
from comkd_cli.packaging.graphs import ImageClassifier, ImageEncoder, export_graph
from comkd_cli.packaging.parity import measure_parity
from comkd_cli.predictor import Preprocessing, UnreadableImage, prepare
from comkd_cli.progress import Notice, Report, Stage

PARITY_IMAGES = 64


def export(
    student_file: Path,
    out: Path,
    data_root: Path,
    report: Report,
    force: bool = False,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Export a student, check it, and return the manifest of the bundle at `out`.

    pictures: a folder of real images for the check; None takes those of the student's data. The bundle
    appears whole or not at all. Raises ExportError with the figures where parity does not hold, and
    where `out` exists already unless `force`.
    """
    if out.exists() and not force:
        raise ExportError(f"{out}: is there already; replace it with --force, or choose another --out")
    student, record = load_student(student_file)
    if pictures is None:
        source = open_source(record.recipe.data, data_root)
        image_set = source.test or source.train
    else:
        image_set = images_below(pictures)
    images = _real_images(image_set, record.preprocessing, report)
    with torch.no_grad():
        answers = [student(torch.from_numpy(part)) for part in np.array_split(images, -(-len(images) // 8))]
    features = torch.cat([answer.features for answer in answers]).numpy()
    logits = torch.cat([answer.logits for answer in answers]).numpy()
    with folder_written_whole(out) as folder:
        report(Stage(f"Exporting {student_file} to ONNX"))
        export_graph(ImageEncoder(student), record.preprocessing, "image_features", folder / ENCODER)
        export_graph(ImageClassifier(student), record.preprocessing, "logits", folder / CLASSIFIER)
        report(Stage(f"Checking parity in onnxruntime on {len(images)} images"))
        parity = measure_parity(folder / ENCODER, folder / CLASSIFIER, images, features, logits)
        if not parity.holds:
            raise ExportError(f"the graphs do not answer as the student does; no bundle is left: {parity.figures()}")
        report(Notice(f"parity holds: {parity.figures()}"))
        vectors = student.class_vectors.numpy()
        return complete_bundle(folder, record, vectors, float(student.logit_scale), parity)


def _real_images(images: ImageSet, preprocessing: Preprocessing, report: Report) -> np.ndarray:
    """Up to PARITY_IMAGES prepared images, evenly spaced over the set: float32 (images, 3, size, size)."""
    count = min(PARITY_IMAGES, len(images))
    prepared = []
    for index in np.linspace(0, len(images) - 1, count).round().astype(int):
        try:
            prepared.append(prepare(images.open(int(index)), preprocessing))
        except UnreadableImage as error:
            report(Notice(f"unreadable, left out: {error}"))
    if not prepared:  # none there, or none readable
        raise DataError("none of the images for the parity check could be read; give others with --images")
    return np.stack(prepared)
