"""From a student to a bundle whose graphs answer as it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.backbones import bpe_merges
from comkd_cli.checkpoints import StudentRecord, load_student
from comkd_cli.costs import multiply_adds, parameters
from comkd_cli.data.folder import images_below
from comkd_cli.data.source import ImageSet
from comkd_cli.data.sources import open_source
from comkd_cli.errors import CheckpointError, DataError, ExportError, ModelError
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.files import folder_written_whole, write_text
from comkd_cli.method.student import Student
from comkd_cli.packaging.bundle import MERGES, TEXT_ENCODER, Contents, Text, complete_bundle, graph_name
from comkd_cli.packaging.graphs import (
    CLASS_VECTORS,
    OPSET,
    add_classifier,
    check_graph,
    export_image_encoder,
    export_text_encoder,
)
from comkd_cli.packaging.latency import Contender, measure_latency
from comkd_cli.packaging.parity import BATCH_SIZES, GATES, Gate, Parity, Reference, measure_parity
from comkd_cli.packaging.precisions import OPTIMIZATION, in_order, to_fp16, to_int8
from comkd_cli.packaging.runner import run_graph
from comkd_cli.packaging.web import add_web_page
from comkd_cli.predictor import BundleProblem, Preprocessing, UnreadableImage, prepare, read_manifest
from comkd_cli.progress import Notice, Progress, Report, Stage
from comkd_cli.teachers import ClassEncoder, class_encoder

CHECK_IMAGES = 512
CALIBRATION_IMAGES = 192
TEXT_DIFFERENCE_MAX = 1e-4
STUDENT_BATCH = 32


@dataclass(frozen=True)
class Wishes:
    """What a bundle is to hold and to keep."""

    precisions: Sequence[str] = ("fp32",)
    text: bool = False
    """The text encoder too, so that classes can be added on the device."""
    web: bool = False
    """A page that classifies in a browser."""
    web_runtime: Path | None = None
    """An unpacked onnxruntime-web; None fetches it."""
    benchmark: bool = False
    """Measure latency and memory."""
    opset: int = OPSET
    gates: Mapping[str, Gate] = field(default_factory=lambda: GATES)
    check_images: int = CHECK_IMAGES
    """At most so many real images are compared."""
    pictures: Path | None = None
    """A folder of real images for checks and calibration; None takes those of the student's data."""
    runs: Path = Path("runs")
    """Folder of all runs, where the index of shards is kept."""
    allow_download: bool = False
    """Fetch what student.pt names and this machine lacks."""
    license: str = "unknown"


@dataclass(frozen=True)
class Exported:
    """The bundle's manifest, and by precision why one that was asked for is not in it."""

    manifest: dict[str, Any]
    failed: dict[str, str]


def export(
    student_file: Path, out: Path, data_root: Path, report: Report, force: bool = False, wishes: Wishes | None = None
) -> Exported:
    """Export a student, check it, and leave a bundle at `out`.

    The bundle appears whole or not at all; a precision that misses its gate is left out of it. Raises
    ExportError where none passes, with the figures, and where `out` exists already unless `force`.
    """
    wishes = wishes or Wishes()
    _check_target(out, force)
    student, record = load_student(student_file, wishes.allow_download)
    teacher = _text_teacher(student_file, record, wishes, report) if wishes.text else None
    checked, calibration = _image_sets(record, data_root, wishes, report)
    reference = _reference(student, checked, record.preprocessing, wishes.check_images, report)
    contents = Contents(
        record=record,
        class_vectors=student.class_vectors.numpy(),
        logit_scale=float(student.logit_scale),
        candidates=student.uses_candidates,
        opset=wishes.opset,
        parameters=parameters(student),
        multiply_adds=multiply_adds(student, record.preprocessing.size),
        license=wishes.license,
    )
    extra = {CLASS_VECTORS: contents.class_vectors} if contents.candidates else {}
    with folder_written_whole(out) as folder:
        report(Stage(f"Exporting {student_file} to ONNX opset {wishes.opset}"))
        source = folder / graph_name("image_encoder", "fp32")
        export_image_encoder(student, record.preprocessing, source, wishes.opset)
        check_graph(source, standard_only=True)
        for precision in in_order(wishes.precisions):
            try:
                if precision == "int8":
                    images, _ = _prepared(calibration, record.preprocessing, CALIBRATION_IMAGES, report)
                    parity = _quantised(folder, contents, images, reference, extra, wishes, report)
                else:
                    parity = _checked(precision, folder, contents, reference, extra, wishes, report)
                contents.parities[precision] = parity
            except ExportError as error:
                contents.failed[precision] = str(error)
                report(Notice(f"{precision} is left out: {error}"))
                _remove_graphs(folder, precision, keep_source=True)
        if not contents.parities:
            reasons = "; ".join(f"{precision}: {why}" for precision, why in contents.failed.items())
            raise ExportError(f"the graphs do not answer as the student does; no bundle was made: {reasons}")
        if teacher is not None:
            contents.text = _add_text(teacher, record, student, folder, wishes.opset, report)
        if wishes.benchmark:
            contents.latency = _measure(student_file, folder, contents, extra, report)
        if "fp32" not in contents.parities:
            _remove_graphs(folder, "fp32", keep_source=False)
        if wishes.web:
            report(Stage("Adding the page for browsers"))
            add_web_page(folder, wishes.web_runtime)
        return Exported(complete_bundle(folder, contents), contents.failed)


def _checked(
    precision: str,
    folder: Path,
    contents: Contents,
    reference: Reference,
    extra: Mapping[str, np.ndarray],
    wishes: Wishes,
    report: Report,
) -> Parity:
    """The parity of a precision, whose encoder for int8 is there already. Raises ExportError where it fails."""
    encoder, classifier = (folder / graph_name(what, precision) for what in ("image_encoder", "classifier"))
    if precision == "fp16":
        to_fp16(folder / graph_name("image_encoder", "fp32"), encoder)
    add_classifier(encoder, classifier, contents.class_vectors, contents.logit_scale)
    for path in (encoder, classifier):
        check_graph(path, standard_only=precision != "int8")
    report(Stage(f"Checking {precision} in onnxruntime on {len(reference.images)} images"))
    parity = measure_parity(encoder, classifier, reference, extra, OPTIMIZATION[precision])
    if missed := parity.failures(wishes.gates[precision]):
        raise ExportError(f"{', '.join(missed)} on {parity.images} images")
    report(Notice(f"{precision} holds: {parity.figures()}"))
    return parity


def _quantised(
    folder: Path,
    contents: Contents,
    images: np.ndarray,
    reference: Reference,
    extra: dict[str, np.ndarray],
    wishes: Wishes,
    report: Report,
) -> Parity:
    """The parity of the first way to int8 that passes the gate. Raises ExportError where none does."""
    report(Stage(f"Quantising to int8, with {len(images)} images to calibrate and compare"))
    ways = to_int8(folder / graph_name("image_encoder", "fp32"), images, extra)
    missed = []
    try:
        for position, (way, path) in enumerate(ways):
            path.replace(folder / graph_name("image_encoder", "int8"))
            try:
                parity = _checked("int8", folder, contents, reference, extra, wishes, report)
            except ExportError as error:
                missed.append(f"{way.method}: {error}")
                continue
            others = [other for other, _ in ways[:position] + ways[position + 1 :]]
            contents.quantisation = [way, *others]
            return parity
        raise ExportError("; ".join(missed))
    finally:
        for _, path in ways:
            path.unlink(missing_ok=True)


def _remove_graphs(folder: Path, precision: str, keep_source: bool) -> None:
    """keep_source: the fp32 encoder stays, since the other precisions are made from it."""
    for what in ("image_encoder", "classifier"):
        if not (keep_source and precision == "fp32" and what == "image_encoder"):
            (folder / graph_name(what, precision)).unlink(missing_ok=True)


def _text_teacher(student_file: Path, record: StudentRecord, wishes: Wishes, report: Report) -> ClassEncoder:
    """Whose text encoder --text exports, before work goes into the rest."""
    try:
        teacher = class_encoder(record, student_file, wishes.allow_download, report)
        bpe_merges(teacher.clip)
        return teacher
    except (CheckpointError, ModelError) as error:
        raise ExportError(
            f"{student_file}: --text needs the student's teacher: {error}; keep the runs folder as it was, or export "
            "without --text"
        ) from error


def _add_text(
    teacher: ClassEncoder, record: StudentRecord, student: Student, folder: Path, opset: int, report: Report
) -> Text:
    """The teacher's text encoder, with the class vectors of the run's own names as the check."""
    report(Stage("Exporting the teacher's text encoder"))
    tokens = teacher.tokens(record.class_names, report)
    write_text(folder / MERGES, bpe_merges(teacher.clip))
    export_text_encoder(teacher.clip.model, tokens.shape[1], folder / TEXT_ENCODER, opset)
    check_graph(folder / TEXT_ENCODER, standard_only=True)
    given = tokens.numpy()
    batches = {f"{size}/{i}": given[i : i + size] for size in BATCH_SIZES for i in range(0, len(given), size)}
    answers = run_graph(folder / TEXT_ENCODER, batches)
    expected = student.class_vectors.numpy()
    gaps = []
    for name, answer in answers.items():
        start = int(name.split("/")[1])
        gaps.append(float(np.abs(answer - expected[start : start + len(answer)]).max()))
    difference = max(gaps)
    if not difference <= TEXT_DIFFERENCE_MAX:
        raise ExportError(
            f"{TEXT_ENCODER}: its features are not the student's class vectors: max |difference| {difference:.2e} "
            f"(limit {TEXT_DIFFERENCE_MAX:.0e})"
        )
    report(Notice(f"text encoder holds: max |difference| {difference:.2e} over {len(tokens)} class prompts"))
    return Text(teacher.prompt, tokens.shape[1], difference)


def _measure(
    student_file: Path, folder: Path, contents: Contents, extra: Mapping[str, np.ndarray], report: Report
) -> list[Any]:
    contenders = [
        Contender(precision, folder / graph_name("classifier", precision), OPTIMIZATION[precision])
        for precision in contents.parities
    ]
    report(Stage("Measuring latency and memory against PyTorch"))

    def step(done: int, total: int) -> None:
        report(Progress("benchmark", done, total))

    return measure_latency(student_file, contenders, contents.record.preprocessing.size, extra, step)


def _image_sets(record: StudentRecord, data_root: Path, wishes: Wishes, report: Report) -> tuple[ImageSet, ImageSet]:
    """Images to check on, with their labels where there are some, and images to calibrate on."""
    if wishes.pictures is not None:
        images = images_below(wishes.pictures, report)
        return images, images
    try:
        source = open_source(record.recipe.data, data_root, wishes.runs, report)
    except DataError as error:
        raise DataError(f"{error}; or give other real images for the checks with --images") from error
    check_classes(record, source)
    return source.test or source.train, source.train


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


def _reference(
    student: Student, images: ImageSet, preprocessing: Preprocessing, most: int, report: Report
) -> Reference:
    """What the student says of up to `most` images."""
    prepared, positions = _prepared(images, preprocessing, most, report)
    report(Stage(f"Asking the student in PyTorch about {len(prepared)} real images"))
    answers = []
    with torch.inference_mode():
        for start in range(0, len(prepared), STUDENT_BATCH):
            answers.append(student(torch.from_numpy(prepared[start : start + STUDENT_BATCH])))
            report(Progress("student", min(start + STUDENT_BATCH, len(prepared)), len(prepared)))
    return Reference(
        images=prepared,
        features=torch.cat([answer.features for answer in answers]).numpy(),
        logits=torch.cat([answer.logits for answer in answers]).numpy(),
        labels=None if images.labels is None else np.asarray(images.labels)[positions],
    )


def _prepared(
    images: ImageSet, preprocessing: Preprocessing, most: int, report: Report
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` images, evenly spaced over the set, prepared: float32 (images, 3, size, size); their positions."""
    prepared, positions = [], []
    for index in np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)):
        try:
            prepared.append(prepare(images.open(int(index)), preprocessing))
            positions.append(index)
        except UnreadableImage as error:
            report(Notice(f"unreadable, left out: {error}"))
    if not prepared:  # none there, or none readable
        raise DataError("none of the images for the checks could be read; give others with --images")
    return np.stack(prepared), np.asarray(positions)
