"""The teacher of a finished student, loaded again and compared with the student's record of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from comkd_cli.data.prompts import Prompts
from comkd_cli.errors import CheckpointError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import Teacher
from comkd_cli.models import downloads
from comkd_cli.models.backbones import Clip, build_clip, load_clip_state
from comkd_cli.models.checkpoints import StudentRecord, load_teacher
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.class_vectors import encode_prompts, report_truncation, tokenize_prompts
from comkd_cli.teachers.loading import ReadyTeacher, build_teacher, load_saved_teacher, teacher_sha256
from comkd_cli.teachers.prompted import Prompted, released_prompted, saved_prompted

# Class vectors of one teacher agree up to rounding, whatever the device; those of two teachers do not.
SAME_VECTORS_COSINE = 0.9999


def teacher_of_student(
    student_file: Path,
    student: Student,
    record: StudentRecord,
    device: torch.device,
    allow_download: bool = False,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """The teacher that a student was distilled from, with the class vectors of the student's classes.

    allow_download: fetch files that student.pt refers to and this machine lacks. Raises CheckpointError or ModelError,
    also if the teacher that is found is a different one.
    """
    check_teacher_files(record, student_file)
    with downloads.forbidden(unless=allow_download):
        if record.teacher is not None:
            path = teacher_file(record, student_file)
            ready = load_saved_teacher(path, record.trained_classes, device, report=report)
            ready = _with_added_classes(ready, record, student_file, device)
        else:
            ready = build_teacher(record.recipe.teacher, record.class_names, record.prompts, device, report)
    _check_same_teacher(ready.teacher, student, _teacher_name(record, student_file))
    if record.teacher_sha256 is None and ready.sha256:
        report(
            Notice(
                f"{student_file}: an earlier version did not record the sha256 of its teacher; the teacher was "
                "compared by its class vectors alone"
            )
        )
    return ready


def _with_added_classes(
    ready: ReadyTeacher, record: StudentRecord, student_file: Path, device: torch.device
) -> ReadyTeacher:
    """The teacher with the vectors of the classes that were added to its student, from its text encoder."""
    if not record.classes_added:
        return ready
    added = _class_encoder(record, student_file, ignore_event).vectors(record.classes_added).to(device)
    own = ready.teacher
    vectors = torch.cat([own.class_vectors.to(device), added])
    return replace(ready, teacher=Teacher(own.image_tower, vectors, own.logit_scale))


@dataclass(frozen=True)
class ClassEncoder:
    """The text half of a teacher, which computes class vectors from class names."""

    clip: Clip
    """Its text encoder holds the learned prompts of a prompted teacher."""
    prompts: Prompts
    """Learned prompts replace the words before the name."""
    learned: nn.Module | None = None
    """The learned prompts of a prompted teacher, which hooks of the CLIP read and which are not part of it."""

    def move_to(self, device: torch.device) -> None:
        """Move the CLIP and the learned prompts to a device."""
        for module in (self.clip.model, self.learned):
            if module is not None:
                module.to(device)

    def tokens(self, class_names: Sequence[str], report: Report = ignore_event) -> Tensor:
        """Token ids (classes, context) of the first prompt of each class."""
        return tokenize_prompts(self.clip, class_names, self.prompts, report)

    def tokens_of_all(self, class_names: Sequence[str], report: Report = ignore_event) -> list[Tensor]:
        """Token ids of all prompts of each class, (prompts, context) for a class."""
        report_truncation(self.clip, class_names, self.prompts, report)
        return [self.clip.tokenize(list(self.prompts.of(name))) for name in class_names]

    def vectors(self, class_names: Sequence[str], report: Report = ignore_event) -> Tensor:
        """Class vectors (classes, dim) of all prompts, L2-normalised, on the CPU."""
        return encode_prompts(self.clip, class_names, self.prompts, torch.device("cpu"), report)


def class_encoder(
    record: StudentRecord, student_file: Path, allow_download: bool = False, report: Report = ignore_event
) -> ClassEncoder:
    """The text half of a student's teacher, on the CPU. Raises CheckpointError or ModelError.

    allow_download: as in `teacher_of_student`.
    """
    check_teacher_files(record, student_file)
    with downloads.forbidden(unless=allow_download):
        return _class_encoder(record, student_file, report)


def _class_encoder(record: StudentRecord, student_file: Path, report: Report) -> ClassEncoder:
    settings = record.recipe.teacher
    if record.teacher is None:
        if settings.format == "promptsrc":
            return _prompted_encoder(released_prompted(settings, report))
        return ClassEncoder(build_clip(settings, report=report), record.prompts)
    path = teacher_file(record, student_file)
    saved = load_teacher(path)
    if saved.prompts is not None:
        return _prompted_encoder(saved_prompted(saved, path))
    if saved.is_frozen_clip:
        raise CheckpointError(
            "its class vectors were fitted to labelled images, so no text encoder can compute those of other classes",
            path=path,
            field="teacher.adapt",
            found="linear_probe",
            remedy="add the classes to the recipe and to the labels, and distil again",
        )
    clip = build_clip(Model(**saved.record.model), load_weights=False)
    load_clip_state(clip, saved.state_dict, path)
    return ClassEncoder(clip, _prompts_of_full(record))


def _prompted_encoder(prompted: Prompted) -> ClassEncoder:
    return ClassEncoder(prompted.clip, Prompts((prompted.template,)), prompted.module.text)


def _prompts_of_full(record: StudentRecord) -> Prompts:
    """The prompts of a teacher that was trained in full: the first of each class, and all of a class added later."""
    prompts, added = record.prompts, set(record.classes_added)
    described = prompts.descriptions.items()
    return Prompts(prompts.templates[:1], {name: texts if name in added else texts[:1] for name, texts in described})


def teacher_file(record: StudentRecord, student_file: Path) -> Path:
    """teacher.pt of a student whose teacher was adapted."""
    assert record.teacher is not None  # the caller checked it
    return Path(os.path.normpath(student_file.parent / record.teacher))


def record_beside(record: StudentRecord, student_file: Path, target: Path) -> StudentRecord:
    """The record for another file, which names its teacher relative to itself."""
    if record.teacher is None:
        return record
    return replace(record, teacher=os.path.relpath(teacher_file(record, student_file), target.parent))


def check_teacher_files(record: StudentRecord, student_file: Path) -> None:
    """Raise CheckpointError if a file of the teacher changed since the student was distilled.

    Missing files are reported by the code that reads them.
    """
    settings = record.recipe.teacher
    checkpoint = None if record.teacher is None else teacher_file(record, student_file)
    if not record.teacher_sha256 or (checkpoint is not None and not checkpoint.is_file()):
        return
    found = teacher_sha256(settings, checkpoint)
    for name, digest in record.teacher_sha256.items():
        if found.get(name, digest) != digest:
            path = str(checkpoint) if name == "teacher" else str(getattr(settings, name)).removeprefix("local-dir:")
            raise CheckpointError(
                f"is not the teacher that {student_file} was distilled from: its sha256 was {digest} and is now",
                path=path,
                found=found[name],
                remedy="restore the old file, or distil again",
            )


def _teacher_name(record: StudentRecord, student_file: Path) -> str:
    if record.teacher is not None:
        return str(teacher_file(record, student_file))
    settings = record.recipe.teacher
    return ":".join(part for part in (settings.arch, settings.weights) if part)


def _check_same_teacher(teacher: Teacher, student: Student, name: str) -> None:
    """Refuse a teacher whose class vectors or logit scale are not those that the student was distilled with."""
    theirs, own = teacher.class_vectors.cpu(), student.class_vectors.cpu()
    difference = None
    if theirs.shape != own.shape:
        difference = f"its class vectors are {tuple(theirs.shape)}, and the student's {tuple(own.shape)}"
    elif (cosine := float(nn.functional.cosine_similarity(theirs, own).min())) < SAME_VECTORS_COSINE:
        difference = f"its class vectors differ from the student's, with a smallest cosine of {cosine:.4f}"
    elif not torch.allclose(teacher.logit_scale.cpu(), student.logit_scale.cpu(), rtol=1e-3):
        difference = (
            f"its logit scale is {float(teacher.logit_scale):.4g}, and the student's {float(student.logit_scale):.4g}"
        )
    if difference is not None:
        raise CheckpointError(
            "is not the teacher that the student was distilled from",
            path=name,
            found=difference,
            remedy="restore the teacher that the student was distilled from, or distil again",
        )
