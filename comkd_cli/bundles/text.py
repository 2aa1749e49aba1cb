"""The text encoder of a bundle, with which a device can add classes: the teacher's, or one distilled from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comkd_cli.bundles.bundle import TEXT_ENCODER, Head, Text, graph_name
from comkd_cli.bundles.gates import TEXT_GATE, Gate, in_order
from comkd_cli.bundles.graphs import GraphForm, TextEncoder, check_graph, export_text_encoder
from comkd_cli.bundles.parity import BATCH_SIZES
from comkd_cli.bundles.precisions import OPTIMIZATION
from comkd_cli.bundles.runner import run_graph
from comkd_cli.bundles.text_precisions import (
    CHOOSE_NAMES,
    GATE_NAMES,
    REDUCED,
    TextComparison,
    TextFigures,
    text_vectors,
    write_text_graph,
)
from comkd_cli.bundles.text_tokenizer import ClipTokenizerData, JsonTokenizerData, TokenizerData, tokenizer_data
from comkd_cli.data.class_names import class_key
from comkd_cli.data.prompts import Prompts
from comkd_cli.errors import CheckpointError, ExportError, ModelError
from comkd_cli.evaluation.text_encoders import cosine_rows, least_agreement_percent
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.models.backbones import context_length
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.models.costs import text_parameters
from comkd_cli.models.text_student import load_text_student
from comkd_cli.teachers.of_student import SAME_VECTORS_COSINE, class_encoder

DIFFERENCE_MAX = 1e-4


@dataclass(frozen=True)
class TextTower:
    """A text encoder that a bundle can have."""

    name: str
    """For messages."""
    module: nn.Module
    """From token ids int64 (texts, context) to L2-normalised features (texts, dim)."""
    tokenize: Callable[[Sequence[str]], Tensor]
    """From texts to token ids (texts, context)."""
    context_length: int
    tokenizer: TokenizerData
    prompts: Prompts
    """Of the classes that a device adds."""
    parameters: int
    distilled: Mapping[str, Any] | None = None
    """How close it is to the teacher's text encoder, if it was distilled from that."""

    def tokens_of_all(self, names: Sequence[str]) -> list[Tensor]:
        """Token ids of all prompts of each class, (prompts, context) for a class."""
        return [self.tokenize(list(self.prompts.of(name))) for name in names]

    def first_tokens(self, names: Sequence[str]) -> np.ndarray:
        """Token ids of the first prompt of each class, int64 (names, context)."""
        return self.tokenize([self.prompts.of(name)[0] for name in names]).numpy()


@dataclass(frozen=True)
class TextOptions:
    """Which text encoder a bundle should contain."""

    text: bool = False
    """Include a text encoder, so that a device can add classes."""
    text_student: Path | None = None
    """A text_student.pt, whose text encoder is included; None uses the teacher's."""
    text_precisions: Sequence[str] = ()
    """Of the text encoder; empty for those of the other graphs."""
    allow_download: bool = False
    """Fetch files that student.pt refers to and this machine lacks."""


def choose_tower(
    student_file: Path, record: StudentRecord, head: Head, options: TextOptions, report: Report
) -> TextTower | None:
    """The text encoder that the options ask for. Raises ExportError, ModelError or CheckpointError."""
    if not options.text:
        return None
    if options.text_student is not None:
        return distilled_tower(options.text_student, record, head.class_vectors)
    return teacher_tower(student_file, record, options.allow_download, report)


def teacher_tower(student_file: Path, record: StudentRecord, allow_download: bool, report: Report) -> TextTower:
    """The text half of a student's teacher. Raises ExportError if it is not available.

    Raises ModelError or ExportError for a tokenizer that predict.py cannot have.
    """
    try:
        teacher = class_encoder(record, student_file, allow_download, report)
    except (CheckpointError, ModelError) as error:
        raise ExportError(
            f"--text needs the student's teacher: {error}",
            path=student_file,
            remedy="restore the teacher's files in the runs folder, or export without --text",
        ) from error
    clip, length = teacher.clip, context_length(teacher.clip)
    tokenizer = tokenizer_data(clip, length)
    if isinstance(tokenizer, JsonTokenizerData):
        names = (*record.class_names, *GATE_NAMES)
        tokenizer.check(clip.tokenize, [text for name in names for text in teacher.prompts.of(name)])
    teacher.tokens_of_all(record.class_names, report)  # reports the prompts that are truncated
    return TextTower(
        name="the teacher's text encoder",
        module=TextEncoder(clip.model),
        tokenize=clip.tokenize,
        context_length=length,
        tokenizer=tokenizer,
        prompts=teacher.prompts,
        parameters=text_parameters(clip.model),
    )


def distilled_tower(path: Path, record: StudentRecord, class_vectors: np.ndarray) -> TextTower:
    """The text encoder of a text_student.pt. class_vectors: of the student, (classes, dim).

    Raises CheckpointError, also if it and the student were distilled from different teachers.
    """
    module, content = load_text_student(path)
    own = dict(zip(content.class_names, content.class_vectors.numpy(), strict=True))
    if set(own) != set(record.trained_classes):
        raise CheckpointError(
            "was distilled from the teacher of other classes",
            path=path,
            remedy="run `comkd distill-text` for this student",
        )
    expected = class_vectors[: len(record.trained_classes)]
    found = np.stack([own[name] for name in record.trained_classes])
    if found.shape != expected.shape or not (cosine_rows(found, expected) >= SAME_VECTORS_COSINE).all():
        raise CheckpointError(
            "was distilled from a different teacher than the student",
            path=path,
            remedy="run `comkd distill-text` for this student",
        )
    tokenizer = content.tokenizer()
    return TextTower(
        name="the distilled text encoder",
        module=module,
        tokenize=lambda texts: torch.from_numpy(tokenizer(list(texts))),
        context_length=content.context_length,
        tokenizer=ClipTokenizerData(content.merges, content.vocabulary),
        prompts=Prompts(content.templates, record.descriptions),
        parameters=content.parameters,
        distilled={"teacher_parameters": content.teacher_parameters, **content.metrics},
    )


@dataclass
class TextExporter:
    """Writes a text encoder into a bundle's folder, in each precision that passes its gate."""

    tower: TextTower
    folder: Path
    record: StudentRecord
    class_vectors: np.ndarray
    """float32 (classes, dim): of the student."""
    report: Report
    form: GraphForm
    gate: Gate = TEXT_GATE
    failed: dict[str, str] = field(default_factory=dict)
    """By `text PRECISION`: why it is not in the bundle."""

    def add(self, precisions: Sequence[str], features: np.ndarray) -> Text:
        """Write the graphs and the tokenizer's data. Raises ExportError if the fp32 graph fails.

        features: of the student on the gate's images, (images, dim). fp32 is left out if it is not among the precisions
        and another one passes its gate.
        """
        tower = self.tower
        self.report(Stage(f"Exporting {tower.name}"))
        files = tower.tokenizer.write(self.folder)
        difference, vectors = self._add_fp32()
        entries = {"fp32": self._entry("fp32")}
        if reduced := [precision for precision in in_order(precisions) if precision in REDUCED]:
            entries |= self._add_reduced(reduced, features)
        if "fp32" not in precisions and len(entries) > 1:
            (self.folder / entries.pop("fp32")["file"]).unlink()
        templates, distilled = tower.prompts.templates, None
        if tower.distilled is not None:
            distilled = {**tower.distilled, **self._against(vectors, features)}
            self.report(Notice(against_teacher(distilled)))
        return Text(
            prompt=templates[0],
            context_length=tower.context_length,
            difference_max=difference,
            templates=templates,
            precisions=entries,
            parameters=tower.parameters,
            distilled=distilled,
            **files,
        )

    def _add_fp32(self) -> tuple[float, np.ndarray]:
        """Write the fp32 graph; returns its largest |difference| and PyTorch's class vectors. Raises ExportError."""
        tower, graph = self.tower, self.folder / TEXT_ENCODER
        tokens = tower.tokens_of_all(self.record.class_names)
        export_text_encoder(tower.module, tower.context_length, graph, self.form)
        check_graph(graph, standard_only=True)
        expected = self.class_vectors if tower.distilled is None else _vectors(tower.module, tokens)
        difference = _difference(graph, [part.numpy() for part in tokens], expected)
        if not difference <= DIFFERENCE_MAX:  # also if it is NaN
            reference = "the student's class vectors" if tower.distilled is None else "those of PyTorch"
            raise ExportError(
                f"its features differ from {reference}",
                path=TEXT_ENCODER,
                found=f"max |difference| {difference:.2e}",
                allowed=f"{DIFFERENCE_MAX:.0e}",
            )
        prompts = sum(map(len, tokens))
        self.report(Notice(f"The text encoder passes: max |difference| {difference:.2e} over {prompts} class prompts"))
        return difference, expected

    def _add_reduced(self, precisions: Sequence[str], features: np.ndarray) -> dict[str, dict[str, Any]]:
        """Write the graphs in fewer bits; returns the entries of those that pass their gate."""
        names, classes = self._gate_names()
        tokens = self.tower.first_tokens(names)
        exact = text_vectors(self.folder / TEXT_ENCODER, tokens, OPTIMIZATION["fp32"])
        comparison = TextComparison(tokens, exact, classes, features)
        entries = {}
        for precision in precisions:
            try:
                entries[precision] = self._add(precision, comparison)
            except ExportError as error:
                self.failed[f"text {precision}"] = str(error)
                self.report(Notice(f"The text encoder in {precision} is left out: {error}"))
                (self.folder / graph_name("text_encoder", precision)).unlink(missing_ok=True)
        return entries

    def _add(self, precision: str, comparison: TextComparison) -> dict[str, Any]:
        """Write the graph of a precision; returns its entry in the manifest. Raises ExportError if it fails."""
        graph = self.folder / graph_name("text_encoder", precision)
        method = write_text_graph(precision, self.folder / TEXT_ENCODER, graph, self.tower.first_tokens(CHOOSE_NAMES))
        check_graph(graph, standard_only=precision != "int8")
        figures = comparison.figures(text_vectors(graph, comparison.tokens, OPTIMIZATION[precision]))
        if missed := figures.failures(self.gate):
            raise ExportError(f"{f'{method}: ' if method else ''}{', '.join(missed)}")
        self.report(
            Notice(
                f"The text encoder in {precision} passes its gate: smallest cosine {figures.cosine_min:.5f} of "
                f"{figures.names} names, top-1 agreement {figures.agreement_percent:.2f} % on {figures.images} images"
            )
        )
        return self._entry(precision, figures, method)

    def _entry(self, precision: str, figures: TextFigures | None = None, method: str | None = None) -> dict[str, Any]:
        entry = {"file": graph_name("text_encoder", precision), "optimization": OPTIMIZATION[precision]}
        return {**entry, **({"method": method} if method else {}), **(asdict(figures) if figures else {})}

    def _gate_names(self) -> tuple[list[str], int]:
        """The names to compare, those of the run first, and how many those are."""
        own = list(self.record.class_names)
        taken = {class_key(name) for name in own}
        return [*own, *(name for name in GATE_NAMES if class_key(name) not in taken)], len(own)

    def _against(self, vectors: np.ndarray, features: np.ndarray) -> dict[str, float]:
        """A distilled encoder's vectors of the run's classes against the teacher's."""
        cosines = cosine_rows(vectors, self.class_vectors)
        return {
            "classes_cosine_mean": float(cosines.mean()),
            "classes_cosine_min": float(cosines.min()),
            "gate_agreement_percent": least_agreement_percent(features, self.class_vectors, vectors),
        }


def against_teacher(distilled: Mapping[str, Any]) -> str:
    """How close a distilled text encoder is to the teacher's. distilled: as in `Text.distilled`.

    The checks of its graphs show only that they compute what PyTorch computes, not that this is of use.
    """
    text = (
        f"The distilled text encoder against the teacher's: {distilled['gate_agreement_percent']:.1f} % of the gate's "
        f"images keep their class, worst class cosine {distilled['classes_cosine_min']:.3f}"
    )
    mean, constant = distilled["held_out_cosine_mean"], distilled["constant_cosine_mean"]
    if mean <= constant:
        text += (
            f". On held-out names it is no closer to the teacher's than one constant vector (mean cosine {mean:.4f}, "
            f"constant {constant:.4f}), so it hardly distinguishes classes that a device adds"
        )
    return text


@torch.inference_mode()
def _vectors(module: nn.Module, tokens: Sequence[Tensor]) -> np.ndarray:
    """PyTorch's class vectors: the normalised mean of the features of each class's prompts, (classes, dim)."""
    means = torch.stack([module.eval()(part).mean(0) for part in tokens])
    return nn.functional.normalize(means, dim=-1).numpy()


def _difference(graph: Path, tokens: Sequence[np.ndarray], expected: np.ndarray) -> float:
    """The largest |difference| of the graph's class vectors, over all batch sizes; NaN if any is NaN.

    tokens: of all prompts of each class, (prompts, context). For a class with several, the normalised mean counts, and
    prompts are run only at the largest batch size.
    """
    rows, counts = np.concatenate(tokens), np.array([len(part) for part in tokens])
    single = len(rows) == len(tokens)
    sizes = BATCH_SIZES if single else BATCH_SIZES[-1:]
    batches = {f"{size}/{i}": rows[i : i + size] for size in sizes for i in range(0, len(rows), size)}
    outputs = run_graph(graph, batches)
    differences = []
    for size in sizes:
        features = np.concatenate([outputs[f"{size}/{i}"] for i in range(0, len(rows), size)])
        if not single:
            sums = np.add.reduceat(features, np.cumsum(counts) - counts)
            features = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        differences.append(np.abs(features - expected).max())
    return float(np.max(differences))
