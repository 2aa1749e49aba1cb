"""The text encoder of a student's teacher, with which a device can add classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from comkd_cli.bundles.bundle import MERGES, TEXT_ENCODER, Text
from comkd_cli.bundles.graphs import GraphForm, check_graph, export_text_encoder
from comkd_cli.bundles.parity import BATCH_SIZES
from comkd_cli.bundles.runner import run_graph
from comkd_cli.errors import CheckpointError, ExportError, ModelError
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.files import write_text
from comkd_cli.models.backbones import bpe_merges
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.teachers.of_student import ClassEncoder, class_encoder

DIFFERENCE_MAX = 1e-4


def text_teacher(student_file: Path, record: StudentRecord, allow_download: bool, report: Report) -> ClassEncoder:
    """The text half of a student's teacher. Raises ExportError if it or CLIP's vocabulary is not available."""
    try:
        teacher = class_encoder(record, student_file, allow_download, report)
        bpe_merges(teacher.clip)
        return teacher
    except (CheckpointError, ModelError) as error:
        raise ExportError(
            f"--text needs the student's teacher: {error}",
            path=student_file,
            remedy="keep the runs folder as it was, or export without --text",
        ) from error


def add_text_encoder(
    folder: Path,
    teacher: ClassEncoder,
    record: StudentRecord,
    class_vectors: np.ndarray,
    form: GraphForm,
    report: Report,
) -> Text:
    """Write the text encoder's graph and its vocabulary, checked on the prompts of the student's own classes.

    class_vectors: float32 (classes, dim), the expected features of those prompts. Raises ExportError.
    """
    report(Stage("Exporting the teacher's text encoder"))
    tokens = teacher.tokens_of_all(record.class_names, report)
    context = tokens[0].shape[1]
    write_text(folder / MERGES, bpe_merges(teacher.clip))
    export_text_encoder(teacher.clip.model, context, folder / TEXT_ENCODER, form)
    check_graph(folder / TEXT_ENCODER, standard_only=True)
    difference = _difference(folder / TEXT_ENCODER, [part.numpy() for part in tokens], class_vectors)
    if not difference <= DIFFERENCE_MAX:  # also if it is NaN
        raise ExportError(
            "its features are not the student's class vectors",
            path=TEXT_ENCODER,
            found=f"max |difference| {difference:.2e}",
            allowed=f"{DIFFERENCE_MAX:.0e}",
        )
    report(
        Notice(f"The text encoder passes: max |difference| {difference:.2e} over {sum(map(len, tokens))} class prompts")
    )
    templates = teacher.prompts.templates
    return Text(templates[0], context, difference, templates)


def _difference(graph: Path, tokens: Sequence[np.ndarray], expected: np.ndarray) -> float:
    """The largest |difference| of the graph's class vectors, over all batch sizes; NaN if any is NaN.

    tokens: of all prompts of each class, (prompts, context). Of a class with several, the normalised mean counts, and
    prompts are run at the largest batch size alone.
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
