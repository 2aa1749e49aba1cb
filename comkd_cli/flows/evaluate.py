"""Scores of students, of their teachers, and of plain CLIP models, with no training images touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from comkd_cli.checkpoints import StudentRecord, load_student
from comkd_cli.data.loaders import worker_count
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.sources import open_source
from comkd_cli.errors import CheckpointError, DataError, ModelError
from comkd_cli.evaluation.metrics import agreement_percent, mean_per_class_percent, top1_percent
from comkd_cli.evaluation.zero_shot import Answers, answer
from comkd_cli.method.student import image_tower_parameters
from comkd_cli.predictor import Preprocessing
from comkd_cli.progress import Notice, Report, Stage
from comkd_cli.recipe.model import SCHEMES, Data, Model
from comkd_cli.results import Record, Role
from comkd_cli.teachers import ReadyTeacher, saved_teacher, zero_shot_teacher


@dataclass(frozen=True)
class Bench:
    """Where and on what models are scored."""

    device: torch.device
    data_root: Path
    report: Report
    data: Data | None = None
    """Instead of the data that a student learned from."""


def evaluate(model: str | None, runs: Path, bench: Bench) -> list[Record]:
    """The scores of a student.pt, of ARCH:WEIGHTS, or with None of each data set's newest student."""
    if model is None:
        students = newest_students(runs)
        if not students:
            raise DataError(f"{runs}: holds no finished student; make one with `comkd distill digits`")
        return [record for path in students.values() for record in evaluate_student(path, bench)]
    if Path(model).exists() or (model.endswith(".pt") and ":" not in model):
        return evaluate_student(Path(model), bench)
    return evaluate_baseline(model, bench)


def home_of(model: str | None, runs: Path) -> Path:
    """Where results.json goes if nobody says: beside a student, else into the folder of runs."""
    return Path(model).parent if model is not None and Path(model).is_file() else runs


def evaluate_student(path: Path, bench: Bench) -> list[Record]:
    """A student and its teacher on the test images of its data, or of the bench's.

    Where there are no test images, or none with labels, what is left is how often the two agree. A
    teacher that can't be found is a notice, and the student is scored alone. Raises CheckpointError,
    DataError.
    """
    student, record = load_student(path)
    data = bench.data or record.recipe.data
    source = open_source(data, bench.data_root)
    _check_classes(record, source)
    images = _scored_images(source, bench.report)
    workers = worker_count(data)
    bench.report(Stage(f"Scoring {path} on {len(images)} images of {source.name}"))
    student_answers = _answers(
        student, lambda x: student(x).logits, record.preprocessing, images, workers, bench, "student"
    )
    scored = _record(student_answers, str(path), "student", source, student, record.recipe.seed)
    ready = _teacher_of(path, record, source, bench)
    if ready is None:
        return [scored]
    teacher = ready.teacher
    teacher_answers = _answers(
        teacher, lambda x: teacher(x).logits, ready.preprocessing, images, workers, bench, "teacher"
    )
    agreement = agreement_percent(student_answers.predicted, teacher_answers.predicted)
    name = ready.checkpoint or record.recipe.teacher.weights or record.recipe.teacher.arch
    return [
        replace(scored, agreement_percent=agreement),
        _record(teacher_answers, str(name), "teacher", source, teacher),
    ]


def evaluate_baseline(argument: str, bench: Bench) -> list[Record]:
    """A plain CLIP, given as ARCH:WEIGHTS, zero-shot on the test images of the bench's data."""
    if bench.data is None:
        raise DataError(f"{argument}: say on what to score it, with --dataset or --folder")
    model = _parse_argument(argument)
    source = open_source(bench.data, bench.data_root)
    images = _scored_images(source, bench.report)
    bench.report(Stage(f"Scoring {argument} on {len(images)} images of {source.name}"))
    ready = zero_shot_teacher(model, source.prompts, bench.device)
    teacher = ready.teacher
    answers = _answers(
        teacher,
        lambda x: teacher(x).logits,
        ready.preprocessing,
        images,
        worker_count(bench.data),
        bench,
        "baseline",
    )
    return [_record(answers, argument, "baseline", source, teacher)]


def newest_students(runs: Path) -> dict[str, Path]:
    """For each data set, by name, the student that was finished last below a folder of runs."""
    found = sorted(runs.glob("*/*/seed*/student.pt"), key=lambda path: path.stat().st_mtime)
    return {path.parent.parent.name: path for path in found}


def _parse_argument(argument: str) -> Model:
    if argument.startswith(SCHEMES):
        return Model(arch=argument)
    arch, colon, weights = argument.partition(":")
    if not colon or not weights:
        raise ModelError(f"{argument}: is neither a student.pt nor ARCH:WEIGHTS, such as ViT-B-32:laion2b_s34b_b79k")
    return Model(arch=arch, weights=weights)


def _scored_images(source: Source, report: Report) -> ImageSet:
    if source.test is not None and len(source.test):
        if source.test.labels is None:
            report(Notice(f"the test images of {source.name} have no labels: only agreement can be measured"))
        return source.test
    report(Notice(f"{source.name} has no test images: agreement is measured on the training images, without labels"))
    return replace(source.train, labels=None)


def _answers(
    model: nn.Module,
    logits_of: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    images: ImageSet,
    workers: int,
    bench: Bench,
    label: str,
) -> Answers:
    model.to(bench.device).eval()
    answers = answer(logits_of, images, preprocessing, bench.device, workers, bench.report, f"scoring {label}")
    if not len(answers.predicted):
        raise DataError(f"none of the {len(images)} images could be read")
    if answers.unreadable and label != "teacher":  # the teacher meets the same files
        named = "".join(f"\n  {problem}" for problem in answers.unreadable[:10])
        bench.report(Notice(f"{len(answers.unreadable)} images can't be read and are left out:{named}"))
    return answers


def _record(
    answers: Answers, model: str, role: Role, source: Source, module: nn.Module, seed: int | None = None
) -> Record:
    labels = answers.labels
    return Record(
        model=model,
        role=role,
        dataset=source.name,
        top1_percent=None if labels is None else top1_percent(answers.predicted, labels),
        mean_per_class_percent=None if labels is None else mean_per_class_percent(answers.predicted, labels),
        images=len(answers.predicted),
        image_tower_parameters=image_tower_parameters(module),
        seed=seed,
        unreadable=len(answers.unreadable),
    )


def _teacher_of(path: Path, record: StudentRecord, source: Source, bench: Bench) -> ReadyTeacher | None:
    try:
        if record.teacher is None:
            return zero_shot_teacher(record.recipe.teacher, source.prompts, bench.device)
        return saved_teacher(path.parent / record.teacher)
    except (CheckpointError, ModelError) as error:
        bench.report(Notice(f"the teacher can't be scored beside the student: {error}"))
        return None


def _check_classes(record: StudentRecord, source: Source) -> None:
    if tuple(source.class_names) != record.class_names:
        known: Sequence[str] = record.class_names
        strange = [name for name in source.class_names if name not in known]
        what = f"{', '.join(strange[:5])} are not among them" if strange else "their order or number differs"
        raise DataError(
            f"{source.name}: the student was taught {len(known)} classes, and {what}; score it on the classes it knows"
        )
