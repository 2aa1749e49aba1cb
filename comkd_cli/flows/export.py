"""From a student to a bundle whose graphs match it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from comkd_cli.bundles.bundle import (
    Contents,
    Text,
    changed_score,
    complete_bundle,
    graph_name,
    learns_from_test_images,
)
from comkd_cli.bundles.confidence import Answered, ConfidenceFitter, FittedConfidence, StudentsTeacher, top1_of
from comkd_cli.bundles.fit_part import MOST_TO_FIT, NOT_TRAINED_ON, read_negatives, with_fit_part
from comkd_cli.bundles.folding import folded, folding
from comkd_cli.bundles.gates import GATES, TEXT, TEXT_GATE, Gate, SpeedGate, in_order
from comkd_cli.bundles.graphs import OPSET, GraphForm, add_classifier, check_graph, export_image_encoder
from comkd_cli.bundles.input_parity import InputGraphs
from comkd_cli.bundles.inputs import check_inputs
from comkd_cli.bundles.latency import PYTORCH, Contender, Measured, measure_latency
from comkd_cli.bundles.metadata import Origin, write_metadata
from comkd_cli.bundles.parity import Parity, measure_parity
from comkd_cli.bundles.parts import Part, Parts, Pool, read_parts
from comkd_cli.bundles.precisions import OPTIMIZATION, Quantisation, QuantisationImages, Quantiser, to_fp16
from comkd_cli.bundles.reference import ReferenceWriter
from comkd_cli.bundles.student import StudentToExport
from comkd_cli.bundles.target import check_target, new_bundle
from comkd_cli.bundles.text import TextExporter, TextOptions, TextTower, choose_tower
from comkd_cli.bundles.web import add_web_page, check_runtime
from comkd_cli.data.folder import images_below
from comkd_cli.data.sources import reopen_source
from comkd_cli.errors import DataError, ExportError, Interrupted
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.events import Notice, Progress, Report, Stage
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.models.costs import multiply_adds, parameters
from comkd_cli.runtime.signals import Stopped, stopping_at_once

CHECK_IMAGES = 512
INTERRUPTED = 130  # 128 + SIGINT


@dataclass(frozen=True)
class ExportOptions(TextOptions):
    """What a bundle should contain, and how it is checked."""

    precisions: Sequence[str] = ("fp32",)
    web: bool = False
    """Include a page that classifies in a browser."""
    web_runtime: Path | None = None
    """An unpacked onnxruntime-web; None fetches it."""
    benchmark: bool = False
    """Measure latency and memory."""
    opset: int = OPSET
    batch: int | None = None
    """A fixed length of batches, with which no shape is dynamic; None: any length."""
    inputs: Sequence[str] = ()
    """Inputs of further graphs that prepare their images themselves, of `pixels` and `image`."""
    gates: Mapping[str, Gate] = field(default_factory=lambda: GATES)
    speed: SpeedGate = field(default_factory=SpeedGate)
    """Limits of speed, which imply `benchmark`."""
    check_images: int = CHECK_IMAGES
    """Largest number of real images for the gates."""
    pictures: Path | None = None
    """A folder of real images for gates and int8; None uses those of the student's data."""
    runs: Path = Path("runs")
    """Folder of all runs, which holds the index of shards."""
    license: str = "unknown"
    accept_percent: float = 95.0
    """Of unseen images, those whose answer the threshold accepts."""
    negatives: Path | None = None
    """A folder of images of none of the classes, on which the threshold is measured."""


@dataclass(frozen=True)
class Exported:
    """The manifest of a bundle, and for each precision that was left out the reason."""

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
    """Export a student, check the graphs, and write a bundle to `out`.

    The bundle is written whole or not at all; a precision that fails its gate is left out. Raises ExportError, with the
    figures, if no precision passes, and if `out` exists without `force`; WriteError if the system refuses to write
    there; Interrupted, with all temporary files removed, after a signal.
    """
    options = options or ExportOptions()
    try:
        with stopping_at_once() as check_stop:
            check_target(out, force)
            check_inputs(options.inputs, options.opset, options.batch, options.web)
            check_runtime(options.web_runtime)
            source = StudentToExport.load(student_file, options.allow_download)
            tower = choose_tower(student_file, source.record, source.head, options, report)
            with new_bundle(out, force) as folder:  # before the work below, which a read-only folder would waste
                report(Stage("Reading real images"))
                parts = _read_parts(source.record, data_root, options, report)
                negatives = None
                if options.negatives is not None:
                    negatives = read_negatives(options.negatives, parts, source.record.preprocessing, report)
                exporter = _Exporter(source, folder, parts, options, report)
                exporter.fit_confidence(negatives)
                exporter.add_precisions(check_stop)
                manifest = exporter.complete(None if tower is None else exporter.add_text(tower))
                check_stop()
    except KeyboardInterrupt as error:
        code = error.exit_code if isinstance(error, Stopped) else INTERRUPTED
        raise Interrupted("the export was stopped; it leaves no unfinished bundle", code) from error
    return Exported(manifest, dict(exporter.failed))


class _Exporter:
    """Writes the graphs of a student into a folder, checks them against their gates, and completes the bundle."""

    def __init__(
        self, source: StudentToExport, folder: Path, parts: Parts, options: ExportOptions, report: Report
    ) -> None:
        self._folder, self._parts, self._options, self._report = folder, parts, options, report
        self.form = GraphForm(options.opset, options.batch)
        self._reference = replace(source.reference(parts.gate, report), batch=options.batch)
        self._folding = folding(source.student, self._reference.images, self._reference.features, report)
        self._source = replace(source, student=folded(source.student, self._folding))
        self._references = ReferenceWriter(source.record.preprocessing, source.head.logit_scale, self._source.extra)
        self._parities: dict[str, Parity] = {}
        self._quantisation: list[Quantisation] = []
        self._confidence: FittedConfidence
        self._origin: Origin
        self._student_top1: tuple[float, int] | None = None
        self.failed: dict[str, str] = {}
        """By precision, or `text PRECISION`: why it is not in the bundle."""
        self._inputs = InputGraphs(parts.gate, source.record.preprocessing, source.head.matrix, self._source.extra)

    def fit_confidence(self, negatives: Part | None) -> None:
        """Fit the temperature and the threshold, and measure the threshold on images of none of the classes."""
        source, parts = self._source, self._parts
        gate, unseen = Answered(parts.gate, self._reference.logits), None
        if parts.fit is not None:
            unseen = Answered(parts.fit, source.reference(parts.fit, self._report).logits)
        teacher = StudentsTeacher(
            source.file, source.student, source.record, self._options.allow_download, self._report
        )
        fitter = ConfidenceFitter(source.lines, self._options.accept_percent, teacher, self._report)
        fitted = fitter.fit(gate, unseen, parts.no_fit)
        if negatives is not None and fitted.confidence.threshold is None:
            self._report(Notice("--negatives is ignored, because no threshold was fitted"))
        elif negatives is not None:
            fitted = fitted.with_negatives(source.reference(negatives, self._report).logits)
        self._confidence = fitted
        self._student_top1 = top1_of([gate] if unseen is None else [gate, unseen])
        self._origin = source.origin(fitted.confidence.temperature, fitted.threshold)

    def add_precisions(self, check_stop: Callable[[], None]) -> None:
        """Write and check the graphs of every precision. Raises ExportError if none passes its gate."""
        record, encoder = self._source.record, self._graph("image_encoder", "fp32")
        self._report(Stage(f"Exporting {self._source.file} to ONNX opset {self._options.opset}"))
        export_image_encoder(self._source.student, record.preprocessing, encoder, self.form)
        check_graph(encoder, standard_only=True)
        for precision in in_order(self._options.precisions):
            check_stop()
            try:
                if precision == "int8":
                    self._quantise()
                self._parities[precision] = self._check(precision)
                graphs = self._graph("image_encoder", precision), self._graph("classifier", precision)
                self.failed |= self._inputs.add(self._options.inputs, precision, graphs, self._report)
            except ExportError as error:
                check_stop()  # Ctrl-C also stops the process that runs the graph
                self._leave_out(precision, error)
        exact = "fp32" in self._options.precisions
        self._check_some("no requested precision could be exported", None if exact else "add --precision fp32")

    def add_text(self, tower: TextTower) -> Text:
        """Write and check the graphs of a text encoder. Raises ExportError if its fp32 graph fails."""
        source, options, gate = self._source, self._options, self._options.gates.get(TEXT, TEXT_GATE)
        vectors = source.head.class_vectors
        exporter = TextExporter(tower, self._folder, source.record, vectors, self._report, self.form, gate, self.failed)
        return exporter.add(options.text_precisions or options.precisions, self._reference.features)

    def complete(self, text: Text | None) -> dict[str, Any]:
        """Measure latency, add all other files of the bundle, return its manifest. ExportError: no graph is fast."""
        speed = self._options.speed
        latency = self._fast_enough(self._measure()) if self._options.benchmark or speed.measures else []
        if "fp32" not in self._parities:
            self._remove("fp32", keep_encoder=False)
        if self._options.web:
            self._report(Stage("Adding the page for browsers"))
            add_web_page(self._folder, self._options.web_runtime)
        if text is not None:
            for precision, entry in text.precisions.items():
                fields = self._origin.of_text_encoder(text.context_length, text.templates, precision)
                write_metadata(self._folder / entry["file"], fields)
        self._references.write(self._folder, self._parities)
        student, record = self._source.student, self._source.record
        contents = Contents(
            record=record,
            head=self._source.head,
            candidates=student.uses_candidates,
            form=self.form,
            folding=self._folding,
            inputs=self._inputs.graphs,
            parameters=parameters(student),
            multiply_adds=multiply_adds(student, record.preprocessing.size),
            parts=self._parts,
            license=self._options.license,
            parities=self._parities,
            failed=self.failed,
            quantisation=self._quantisation,
            confidence=self._confidence,
            student_top1=self._student_top1,
            student_sha256=self._source.sha256,
            text=text,
            latency=latency,
        )
        if changed := changed_score(contents):
            self._report(Notice(changed))
        return complete_bundle(self._folder, contents)

    def _graph(self, graph: str, precision: str) -> Path:
        return self._folder / graph_name(graph, precision)

    def _check(self, precision: str) -> Parity:
        """The parity of a precision. Raises ExportError if it fails its gate."""
        encoder, classifier = self._graph("image_encoder", precision), self._graph("classifier", precision)
        if precision == "fp16":
            to_fp16(self._graph("image_encoder", "fp32"), encoder)
        head = self._source.head
        add_classifier(encoder, classifier, head.class_vectors, head.logit_scale)
        for path, kind in ((encoder, "image_encoder"), (classifier, "classifier")):
            write_metadata(path, self._origin.of_image_graph(kind, precision))
            check_graph(path, standard_only=precision != "int8")
        self._report(Stage(f"Checking {precision} in onnxruntime on {len(self._reference.images)} images"))
        parity = measure_parity(encoder, classifier, self._reference, self._source.extra, OPTIMIZATION[precision])
        if missed := parity.failures(self._options.gates[precision]):
            method = f"{self._quantisation[0].method}: " if precision == "int8" else ""
            raise ExportError(f"{method}{', '.join(missed)} on {parity.images} images")
        self._references.add_precision(precision, classifier, OPTIMIZATION[precision])
        images = self._parts.gate.size.words(scored=True)
        self._report(Notice(f"{precision} passes its gate: {parity.figures()}, on {images}"))
        return parity

    def _quantise(self) -> None:
        """Write the int8 encoder by the method that is best on images of its own. Raises ExportError.

        The gate's images are used once: to try one method after the other on them would be to choose on them.
        """
        parts = self._parts
        if parts.too_few is not None:
            raise ExportError(parts.too_few)
        calibrate, choose = parts.calibrate.size.words(), parts.choose.size.images
        self._report(Stage(f"Quantising to int8, with {calibrate} to calibrate and {choose} to choose the method"))
        images = QuantisationImages(parts.calibrate.images, parts.choose.images)
        quantiser = Quantiser(images, self._source.head.matrix, self._options.gates["int8"], self._source.extra)
        ranked = quantiser.quantise(self._graph("image_encoder", "fp32"), self._report)
        self._quantisation = [figures for figures, _ in ranked]
        ranked[0][1].replace(self._graph("image_encoder", "int8"))
        for _, path in ranked[1:]:
            path.unlink()

    def _fast_enough(self, latency: list[Measured]) -> list[Measured]:
        """Leave out each precision that misses the gate of speed; the measurements of PyTorch and of the others."""
        for measured in latency:
            if measured.name == PYTORCH or measured.threads != 1:
                continue
            if missed := self._options.speed.failures(1e3 * measured.seconds, measured.speed_up):
                del self._parities[measured.name]
                self._leave_out(measured.name, ExportError(", ".join(missed)))
        self._check_some("no exported graph is fast enough")
        return [measured for measured in latency if measured.name in (PYTORCH, *self._parities)]

    def _leave_out(self, precision: str, error: ExportError) -> None:
        self.failed[precision] = str(error)
        self._report(Notice(f"{precision} is left out: {error}"))
        self._remove(precision, keep_encoder=precision == "fp32")

    def _check_some(self, problem: str, remedy: str | None = None) -> None:
        """Raises ExportError, with every reason, if no precision is left."""
        if not self._parities:
            reasons = "; ".join(f"{precision}: {reason}" for precision, reason in self.failed.items())
            raise ExportError(f"{problem}, so no bundle was written: {reasons}", remedy=remedy)

    def _remove(self, precision: str, keep_encoder: bool) -> None:
        """keep_encoder: the other precisions are made from the fp32 encoder."""
        encoder, classifier = self._graph("image_encoder", precision), self._graph("classifier", precision)
        self._inputs.remove(precision, (encoder, classifier))
        for path in (classifier,) if keep_encoder else (classifier, encoder):
            path.unlink(missing_ok=True)

    def _measure(self) -> list[Measured]:
        contenders = [
            Contender(precision, self._graph("classifier", precision), OPTIMIZATION[precision])
            for precision in self._parities
        ]
        self._report(Stage("Measuring latency and memory against PyTorch"))
        file, size, extra = self._source.file, self._source.record.preprocessing.size, self._source.extra
        return measure_latency(
            file, contenders, size, extra, lambda done, total: self._report(Progress("benchmark", done, total))
        )


def _read_parts(record: StudentRecord, data_root: Path, options: ExportOptions, report: Report) -> Parts:
    """The images of the gates and those that int8 is made with."""
    gate, others = _pools(record, data_root, options, report)
    int8, most = "int8" in options.precisions, options.check_images
    if gate.origin == "training" or (gate.origin == "test" and learns_from_test_images(record)):
        parts = read_parts(gate, others, record.preprocessing, most, int8, report)
        return replace(parts, no_fit="the student was trained on every image; provide others with --images")
    parts = with_fit_part(read_parts(gate, others, record.preprocessing, most + MOST_TO_FIT, int8, report), most)
    if gate.origin == "given" and parts.fit is not None:
        report(Notice(NOT_TRAINED_ON))
    return parts


def _pools(record: StudentRecord, data_root: Path, options: ExportOptions, report: Report) -> tuple[Pool, Pool]:
    """The images for the gates, and those to calibrate and to choose on."""
    if options.pictures is not None:
        pool = Pool(images_below(options.pictures, report), "given")
        return pool, pool
    try:
        source = reopen_source(record.recipe.data, record.holdout, data_root, options.runs, report)
    except DataError as error:
        other = "provide other real images for the checks with --images"
        error.remedy = other if error.remedy is None else f"{error.remedy}, or {other}"
        raise
    check_classes(record, source, report)
    training = Pool(source.train, "training")
    if source.test is None or not len(source.test):
        report(
            Notice(
                f"{source.name} has no test images: graphs are compared on training images, which are not held out, "
                "and no top-1 is reported"
            )
        )
        return training, training
    return Pool(source.test, "test", held_out=source.holdout is not None), training
