"""Lists the classes of a student, and adds classes to it by name: only their vectors, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from comkd_cli.data.class_names import class_key, clean_name
from comkd_cli.errors import CheckpointError, DataError, MisuseError, ModelError
from comkd_cli.events import Notice, Report
from comkd_cli.method.student import Student
from comkd_cli.models.checkpoints import StudentRecord, load_student, load_student_record, save_student
from comkd_cli.results.result_files import forget_model
from comkd_cli.teachers.of_student import SAME_VECTORS_COSINE, ClassEncoder, class_encoder, record_beside

OPTION = "--add"
DEFAULT_NAME = "student-classes.pt"
NEARLY_EQUAL_COSINE = 0.98
EQUAL_COSINE = 1 - 1e-6  # beyond the rounding of vectors of different tokens
MOST_COMPARED = 64  # classes of the student that are encoded again, to recognise its teacher


@dataclass(frozen=True)
class Added:
    """A class that was added, and the class that it is most easily mistaken for."""

    class_name: str
    nearest: str
    cosine: float
    """Between the two class vectors."""


@dataclass(frozen=True)
class AddOptions:
    """How classes are added."""

    out: Path | None = None
    """The new file; None: DEFAULT_NAME beside the student."""
    templates: tuple[str, ...] = ()
    """Prompts of the new classes, with `{}` for the name; empty: those of the student's run."""
    force: bool = False
    """Replace an existing file, which may be the student itself."""
    allow_download: bool = False
    """Download files that student.pt refers to and this machine lacks."""


def list_classes(student_file: Path) -> StudentRecord:
    """The record of a student, which holds its classes. Raises CheckpointError."""
    return load_student_record(student_file)


def add_classes(
    student_file: Path, names: Sequence[str], options: AddOptions, report: Report
) -> tuple[Path, list[Added]]:
    """Write a student that also knows these classes; returns its file, and the nearest class of each.

    The text encoder of its teacher computes their vectors. Raises DataError for a name that cannot be added,
    CheckpointError if the text encoder is not available or does not reproduce the student's own vectors, and
    MisuseError for a template that cannot be used or a file that exists.
    """
    target = options.out or student_file.with_name(DEFAULT_NAME)
    if target.exists() and not options.force:
        raise MisuseError("already exists", path=target, remedy="replace it with --force, or choose another --out")
    student, record = load_student(student_file, options.allow_download)
    new, added = extend_with_classes(student_file, student, record, names, options, report)
    replaced = target.exists()
    save_student(target, student, record_beside(new, student_file, target))
    if replaced:
        forget_model(target.parent, str(target), report)
    return target, added


def extend_with_classes(
    student_file: Path,
    student: Student,
    record: StudentRecord,
    names: Sequence[str],
    options: AddOptions,
    report: Report,
) -> tuple[StudentRecord, list[Added]]:
    """Add classes to a student in memory; returns its new record, and the nearest class of each.

    student_file: the file of the record, from which its teacher is found. Nothing is written, `out` and `force` are not
    used. Raises as `add_classes`.
    """
    new = _record_with(record, names, options.templates)
    encoder = _encoder(student_file, new, options.allow_download, report)
    vectors = _new_vectors(encoder, student, record, new.classes_added[len(record.classes_added) :], report)
    student.add_classes(vectors)
    added = _nearest(new.class_names, student.class_vectors.cpu(), len(vectors))
    for entry in added:
        if entry.cosine > NEARLY_EQUAL_COSINE:
            report(
                Notice(
                    f"{entry.class_name}: its vector is nearly identical to that of {entry.nearest} (cosine "
                    f"{entry.cosine:.4f}), so the student can hardly tell them apart; use a name or a --template that "
                    "differs more"
                )
            )
    return new, added


def _record_with(record: StudentRecord, names: Sequence[str], templates: tuple[str, ...]) -> StudentRecord:
    """The record with more classes. Raises DataError for a name that cannot be added, MisuseError for a template."""
    for template in templates:
        if template.count("{}") != 1:
            raise MisuseError("must contain {} once, for the class name", field="--template", found=repr(template))
    teacher = record.recipe.teacher
    if templates and (teacher.format == "promptsrc" or teacher.adapt.method == "promptsrc"):
        raise MisuseError(
            "the student's teacher uses learned prompts, which a template cannot replace",
            field="--template",
            found=repr(templates[0]),
            remedy="leave --template out",
        )
    taken = {class_key(name) for name in record.class_names}
    cleaned = [clean_name(name, OPTION, f"class {number}") for number, name in enumerate(names, start=1)]
    for name in cleaned:
        if class_key(name) in taken:
            raise DataError("the class exists already", field=OPTION, found=repr(name))
        taken.add(class_key(name))
    described = {name: tuple(template.replace("{}", name) for template in templates) for name in cleaned}
    return replace(
        record,
        class_names=(*record.class_names, *cleaned),
        classes_added=(*record.classes_added, *cleaned),
        descriptions={**record.descriptions, **(described if templates else {})},
    )


def _encoder(student_file: Path, record: StudentRecord, allow_download: bool, report: Report) -> ClassEncoder:
    """The text half of the student's teacher. Raises CheckpointError."""
    try:
        return class_encoder(record, student_file, allow_download, report)
    except (CheckpointError, ModelError) as error:
        raise CheckpointError(
            f"adding classes needs the text encoder of its teacher, which could not be loaded: {error}",
            path=student_file,
            remedy=None if error.remedy else "restore the teacher's files in the runs folder, or try --allow-download",
        ) from error


def _new_vectors(
    encoder: ClassEncoder, student: Student, record: StudentRecord, names: Sequence[str], report: Report
) -> Tensor:
    """The vectors of the new names, (names, dim). record: of the student as it is.

    Raises CheckpointError if the encoder does not reproduce the student's own class vectors, such as those of a head
    that was fitted to labels; DataError for a name that the encoder reads as another class.
    """
    compared = list(range(0, len(record.class_names), -(-len(record.class_names) // MOST_COMPARED)))
    own_vectors = student.class_vectors.cpu()
    own = own_vectors[compared]
    found = encoder.vectors([record.class_names[label] for label in compared])
    cosine = float(nn.functional.cosine_similarity(found, own).min()) if found.shape == own.shape else float("nan")
    if not cosine >= SAME_VECTORS_COSINE:
        raise CheckpointError(
            "the student's class vectors do not match its teacher's text encoder, so no class can be added",
            found=f"smallest cosine {cosine:.4f}",
            allowed=f"at least {SAME_VECTORS_COSINE}",
            remedy="distil a new student with all classes",
        )
    vectors = encoder.vectors(names, report)
    for entry in _nearest((*record.class_names, *names), torch.cat([own_vectors, vectors]), len(names)):
        if entry.cosine > EQUAL_COSINE:
            raise DataError(
                f"the text encoder cannot distinguish this class from {entry.nearest!r}",
                field=OPTION,
                found=repr(entry.class_name),
                remedy="use another name or --template",
            )
    return vectors


def _nearest(class_names: Sequence[str], vectors: Tensor, count: int) -> list[Added]:
    """For each of the last `count` classes the most similar other one. vectors: (classes, dim), L2-normalised."""
    start = len(class_names) - count
    similar = vectors[start:] @ vectors.T
    similar[torch.arange(count), torch.arange(start, start + count)] = -torch.inf
    cosines, labels = similar.max(dim=1)
    return [
        Added(name, class_names[label], cosine)
        for name, label, cosine in zip(class_names[start:], labels.tolist(), cosines.tolist(), strict=True)
    ]
