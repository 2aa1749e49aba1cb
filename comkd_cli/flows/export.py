"""From a student to a bundle whose graphs answer as it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.bundles.bundle import (
    MERGES,
    TEXT_ENCODER,
    Contents,
    Text,
    changed_score,
    check_head,
    complete_bundle,
    graph_name,
)
from comkd_cli.bundles.graphs import (
    CLASS_VECTORS,
    OPSET,
    add_classifier,
    check_graph,
    export_image_encoder,
    export_text_encoder,
)
from comkd_cli.bundles.latency import Contender, measure_latency
from comkd_cli.bundles.parity import BATCH_SIZES, GATES, Gate, Parity, Reference, measure_parity
from comkd_cli.bundles.parts import Part, Parts, Pool, read_parts
from comkd_cli.bundles.precisions import OPTIMIZATION, QuantisationImages, in_order, to_fp16, to_int8
from comkd_cli.bundles.runner import run_graph
from comkd_cli.bundles.web import add_web_page
from comkd_cli.data.folder import images_below
from comkd_cli.data.sources import open_source
from comkd_cli.edge.classifier import BundleProblem, read_manifest
from comkd_cli.errors import CheckpointError, DataError, ExportError, Interrupted, ModelError
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.events import Notice, Progress, Report, Stage
from comkd_cli.files import folder_written_whole, write_text
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import bpe_merges
from comkd_cli.models.checkpoints import StudentRecord, load_student
from comkd_cli.models.costs import multiply_adds, parameters
from comkd_cli.runtime.signals import Stopped, stopping_at_once
from comkd_cli.teachers.of_student import ClassEncoder, class_encoder

CHECK_IMAGES = 512
TEXT_DIFFERENCE_MAX = 1e-4
STUDENT_BATCH = 32
INTERRUPTED = 130  # 128 + SIGINT


@dataclass(frozen=True)
class ExportOptions:
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
    """At most so many real images are compared by the gates."""
    pictures: Path | None = None
    """A folder of real images for gates and int8; None takes those of the student's data."""
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
    student_file: Path,
    out: Path,
    data_root: Path,
    report: Report,
    force: bool = False,
    options: ExportOptions | None = None,
) -> Exported:
    """Export a student, check it, and leave a bundle at `out`.

    The bundle appears whole or not at all; a precision that misses its gate is left out of it. Raises
    ExportError where none passes, with the figures, and where `out` exists already unless `force`; WriteError where
    the system refuses to write there; Interrupted, with everything temporary removed, where a signal asked to stop.
    """
    try:
        with stopping_at_once() as check_stop:
            return _export(student_file, out, data_root, report, force, options or ExportOptions(), check_stop)
    except KeyboardInterrupt as error:
        code = error.exit_code if isinstance(error, Stopped) else INTERRUPTED
        raise Interrupted("the export was stopped; it leaves no unfinished bundle", code) from error


def _export(
    student_file: Path,
    out: Path,
    data_root: Path,
    report: Report,
    force: bool,
    options: ExportOptions,
    check_stop: Callable[[], None],
) -> Exported:
    _check_target(out, force)
    student, record = load_student(student_file, options.allow_download)
    teacher = _text_teacher(student_file, record, options, report) if options.text else None
    class_vectors, logit_scale = student.class_vectors.numpy(), float(student.logit_scale)
    check_head(student_file, record.class_names, class_vectors, logit_scale)
    extra = {CLASS_VECTORS: class_vectors} if student.uses_candidates else {}
    with folder_written_whole(out) as folder:  # first, for an unwritable place should not cost the work below
        parts = _parts(record, data_root, options, report)
        contents = Contents(
            record=record,
            class_vectors=class_vectors,
            logit_scale=logit_scale,
            candidates=student.uses_candidates,
            opset=options.opset,
            parameters=parameters(student),
            multiply_adds=multiply_adds(student, record.preprocessing.size),
            parts=parts,
            license=options.license,
        )
        reference = _reference(student_file, student, parts.gate, contents.head, report)
        report(Stage(f"Exporting {student_file} to ONNX opset {options.opset}"))
        source = folder / graph_name("image_encoder", "fp32")
        export_image_encoder(student, record.preprocessing, source, options.opset)
        check_graph(source, standard_only=True)
        for precision in in_order(options.precisions):
            check_stop()
            try:
                if precision == "int8":
                    parity = _quantised(folder, contents, reference, extra, options, report)
                else:
                    parity = _checked(precision, folder, contents, reference, extra, options, report)
                contents.parities[precision] = parity
            except ExportError as error:
                check_stop()  # Ctrl-C reaches the process that runs the graph, too
                contents.failed[precision] = str(error)
                report(Notice(f"{precision} is left out: {error}"))
                _remove_graphs(folder, precision, keep_source=True)
        if not contents.parities:
            reasons = "; ".join(f"{precision}: {why}" for precision, why in contents.failed.items())
            raise ExportError(f"the graphs do not answer as the student does; no bundle was made: {reasons}")
        if changed := changed_score(contents):
            report(Notice(changed))
        if teacher is not None:
            contents.text = _add_text(teacher, record, student, folder, options.opset, report)
        if options.benchmark:
            contents.latency = _measure(student_file, folder, contents, extra, report)
        if "fp32" not in contents.parities:
            _remove_graphs(folder, "fp32", keep_source=False)
        if options.web:
            report(Stage("Adding the page for browsers"))
            add_web_page(folder, options.web_runtime)
        manifest = complete_bundle(folder, contents)
        check_stop()
    return Exported(manifest, contents.failed)


def _checked(
    precision: str,
    folder: Path,
    contents: Contents,
    reference: Reference,
    extra: Mapping[str, np.ndarray],
    options: ExportOptions,
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
    if missed := parity.failures(options.gates[precision]):
        raise ExportError(f"{', '.join(missed)} on {parity.images} images")
    report(Notice(f"{precision} holds: {parity.figures()}, on {contents.parts.gate.size.words(scored=True)}"))
    return parity


def _quantised(
    folder: Path,
    contents: Contents,
    reference: Reference,
    extra: dict[str, np.ndarray],
    options: ExportOptions,
    report: Report,
) -> Parity:
    """The parity of int8, made in the way that does best on images of its own. Raises ExportError where it fails.

    The gate's images are seen once: trying one way after the other on them until one passes would choose on them.
    """
    parts = contents.parts
    if parts.too_few is not None:
        raise ExportError(parts.too_few)
    images = QuantisationImages(parts.calibrate.images, parts.choose.images)
    report(
        Stage(
            f"Quantising to int8, with {parts.calibrate.size.words()} to calibrate and "
            f"{parts.choose.size.images} to choose the way"
        )
    )
    source = folder / graph_name("image_encoder", "fp32")
    ways = to_int8(source, images, contents.head, options.gates["int8"], extra)
    contents.quantisation = [way for way, _ in ways]
    chosen, path = ways[0]
    path.replace(folder / graph_name("image_encoder", "int8"))
    for _, other in ways[1:]:
        other.unlink()
    try:
        return _checked("int8", folder, contents, reference, extra, options, report)
    except ExportError as error:
        raise ExportError(f"{chosen.method}: {error}") from error


def _remove_graphs(folder: Path, precision: str, keep_source: bool) -> None:
    """keep_source: the fp32 encoder stays, since the other precisions are made from it."""
    for what in ("image_encoder", "classifier"):
        if not (keep_source and precision == "fp32" and what == "image_encoder"):
            (folder / graph_name(what, precision)).unlink(missing_ok=True)


def _text_teacher(student_file: Path, record: StudentRecord, options: ExportOptions, report: Report) -> ClassEncoder:
    """Whose text encoder --text exports, before work goes into the rest."""
    try:
        teacher = class_encoder(record, student_file, options.allow_download, report)
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
        gaps.append(np.abs(answer - expected[start : start + len(answer)]).max())
    difference = float(np.max(gaps))  # not a number where one of them is none, unlike Python's max
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


def _parts(record: StudentRecord, data_root: Path, options: ExportOptions, report: Report) -> Parts:
    """The images of the gates and those that int8 is made with."""
    gate, others = _pools(record, data_root, options, report)
    report(Stage("Reading real images"))
    return read_parts(gate, others, record.preprocessing, options.check_images, "int8" in options.precisions, report)


def _pools(record: StudentRecord, data_root: Path, options: ExportOptions, report: Report) -> tuple[Pool, Pool]:
    """Where the gates' images come from, and where those to calibrate and to choose on."""
    if options.pictures is not None:
        given = Pool(images_below(options.pictures, report), "given")
        return given, given
    try:
        source = open_source(record.recipe.data, data_root, options.runs, report)
    except DataError as error:
        raise DataError(f"{error}; or give other real images for the checks with --images") from error
    check_classes(record, source)
    training = Pool(source.train, "training")
    if source.test is None or not len(source.test):
        report(
            Notice(f"{source.name} has no test images: graphs are compared on training images, and no top-1 is given")
        )
        return training, training
    return Pool(source.test, "test"), training


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


def _reference(student_file: Path, student: Student, part: Part, head: np.ndarray, report: Report) -> Reference:
    """What the student says of images. Raises ExportError where its answers are not numbers."""
    images = part.images
    report(Stage(f"Running the student in PyTorch on {part.size.words()}"))
    answers = []
    with torch.inference_mode():
        for start in range(0, len(images), STUDENT_BATCH):
            answers.append(student(torch.from_numpy(images[start : start + STUDENT_BATCH])))
            report(Progress("student", min(start + STUDENT_BATCH, len(images)), len(images)))
    features = torch.cat([answer.features for answer in answers]).numpy()
    logits = torch.cat([answer.logits for answer in answers]).numpy()
    if odd := int((~np.isfinite(features).all(axis=1) | ~np.isfinite(logits).all(axis=1)).sum()):
        raise ExportError(
            f"{student_file}: its answers to {odd} of {len(images)} images are not numbers (NaN or infinite); "
            "train it again, with a lower optim.learning_rate"
        )
    return Reference(images, features, logits, part.labels, part.different, head)
