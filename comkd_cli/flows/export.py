"""From a student to a bundle whose graphs answer as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.checkpoints import StudentRecord, load_student
from comkd_cli.data.folder import images_below
from comkd_cli.data.source import ImageSet
from comkd_cli.data.sources import open_source
from comkd_cli.errors import DataError, ExportError
from comkd_cli.files import folder_written_whole
from comkd_cli.packaging.bundle import CLASSIFIER, ENCODER, complete_bundle
from comkd_cli.packaging.graphs import ImageClassifier, ImageEncoder, export_graph
from comkd_cli.packaging.parity import measure_parity
from comkd_cli.predictor import BundleProblem, Preprocessing, UnreadableImage, prepare, read_manifest
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
    _check_target(out, force)
    student, record = load_student(student_file)
    if student.uses_candidates:
        raise ExportError(
            f"{student_file}: loss.edu_attention.memory is `candidates`, whose image features depend on the label set; "
            "only students with `training` can be exported so far"
        )
    image_set = _own_images(record, data_root) if pictures is None else images_below(pictures)
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
            raise ExportError(f"the graphs do not answer as the student does; no bundle was made: {parity.figures()}")
        report(Notice(f"parity holds: {parity.figures()}"))
        vectors = student.class_vectors.numpy()
        return complete_bundle(folder, record, vectors, float(student.logit_scale), parity)


def _own_images(record: StudentRecord, data_root: Path) -> ImageSet:
    try:
        source = open_source(record.recipe.data, data_root)
    except DataError as error:
        raise DataError(f"{error}; or give other real images for the parity check with --images") from error
    return source.test or source.train


def _check_target(out: Path, force: bool) -> None:
    """Refuse to replace what is there, and with `force` what is no bundle: --force must not cost a user's files."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ExportError(f"{out}: is there already; replace it with --force, or choose another --out")
    try:
        read_manifest(out)
    except BundleProblem as error:
        raise ExportError(f"{out}: is no bundle, so --force does not replace it; choose another --out") from error


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
