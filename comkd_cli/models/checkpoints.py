"""student.pt and teacher.pt: plain data, loaded with weights_only=True and checked when they are read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comkd_cli.data.holdout import Holdout
from comkd_cli.data.prompts import Prompts
from comkd_cli.edge.images import Preprocessing, checked_preprocessing
from comkd_cli.errors import CheckpointError, ComkdError
from comkd_cli.files import is_newer_format
from comkd_cli.method.student import Student
from comkd_cli.models import downloads
from comkd_cli.models.backbones import Origin, build_image_tower, state_sha256
from comkd_cli.models.plain_data import (
    check_plain,
    check_tensors,
    checked_texts,
    load_plain,
    mapping_or_none,
    reason_of,
    save_plain,
)
from comkd_cli.models.weights import differences_in_error, is_torchscript
from comkd_cli.recipe import Recipe, parse_recipe
from comkd_cli.recipe.architecture import weights_of_transformer
from comkd_cli.recipe.model import Student as StudentSettings

SMALL_WEIGHTS = 2**24  # a model that any machine builds
STUDENT_FORMAT = "comkd-student/1"
TEACHER_FORMAT = "comkd-teacher/1"


@dataclass(frozen=True)
class StudentRecord:
    """The content of student.pt, except the learned tensors."""

    recipe: Recipe
    recipe_name: str
    source: str
    """Name of the data that the student was trained on."""
    class_names: tuple[str, ...]
    template: str
    preprocessing: Preprocessing
    backbone: Origin
    """The initial weights of the student's backbone; a prompts-only student needs them again."""
    backbone_sha256: str | None
    """Of the frozen tensors of a prompts-only student's backbone; None for a student that holds all its weights."""
    teacher: str | None
    """teacher.pt of an adapted teacher, relative to student.pt; None for the zero-shot teacher."""
    identity: str
    """A digest of everything that determines this student."""
    metrics: dict[str, float]
    """Of the epoch whose weights were saved."""
    identity_parts: dict[str, Any] | None = None
    """The parts of which `identity` is a digest; None in files of versions that did not record them."""
    teacher_sha256: dict[str, str] | None = None
    """Of the local files of the teacher, by the recipe's field that names each, or `teacher` for teacher.pt; empty for
    a teacher from a tag or a repository; None in files of versions that did not record it."""
    templates: tuple[str, ...] = ()
    """All prompt templates, `template` first; empty in files of versions that had only one."""
    descriptions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By class name, the prompts of a class that replace those of the templates."""
    classes_added: tuple[str, ...] = ()
    """The last of `class_names` that it was not trained on: `comkd classes --add`."""
    holdout: Holdout | None = None
    """How images were held out of the training; None if they were not, as in files of earlier versions."""

    @property
    def prompts(self) -> Prompts:
        """The prompts of its classes."""
        return Prompts(self.templates or (self.template,), self.descriptions)

    @property
    def trained_classes(self) -> tuple[str, ...]:
        """The classes that it was trained on."""
        return self.class_names[: len(self.class_names) - len(self.classes_added)]


@dataclass(frozen=True)
class TeacherRecord:
    """The content of teacher.pt, except its weights."""

    key: str
    """A digest of everything that determines this teacher; part of the name of its folder."""
    model: dict[str, Any]
    """`arch` or `config`, as in the recipe."""
    class_names: tuple[str, ...]
    template: str
    preprocessing: Preprocessing
    origin: Origin
    metrics: dict[str, float]
    backbone_sha256: str | None = None
    """Of the frozen CLIP under learned prompts or fitted class vectors; None for a teacher that holds all its
    weights."""
    made_of: dict[str, Any] | None = None
    """The parts of which `key` is a digest; None in files of versions that did not record them."""


@dataclass(frozen=True)
class SavedTeacher:
    """The content of teacher.pt."""

    record: TeacherRecord
    class_vectors: Tensor
    """(classes, dim), L2-normalised."""
    logit_scale: Tensor
    """Scalar."""
    state_dict: dict[str, Tensor]
    """Of the whole CLIP; of a prompted one `prompts.vision` and `prompts.text`, (depth, tokens, width) each; empty if
    only the class vectors were fitted."""

    @property
    def is_frozen_clip(self) -> bool:
        """Whether its CLIP is loaded from the weights that it started from, since none of them were trained."""
        return self.record.backbone_sha256 is not None

    @property
    def prompts(self) -> dict[str, Tensor] | None:
        """The learned prompts of the `vision` and the `text` encoder; None for a teacher without them."""
        if not self.is_frozen_clip or not self.state_dict:
            return None
        return {name: self.state_dict[f"prompts.{name}"] for name in ("vision", "text")}


def save_student(
    path: Path, student: Student, record: StudentRecord, learned: Mapping[str, Tensor] | None = None
) -> None:
    """Write student.pt atomically, with only the learned tensors, so that a prompts-only student stays small.

    learned: these tensors; None: `student.learned_state()`, which depends on the parameters that require a gradient.
    Raises ComkdError.
    """
    learned = student.learned_state() if learned is None else learned
    plain = {**asdict(record), "recipe": record.recipe.model_dump(mode="json")}
    save_plain(
        path,
        {
            "format": STUDENT_FORMAT,
            **plain,
            "class_names": list(record.class_names),
            "class_vectors": student.class_vectors.cpu(),
            "logit_scale": student.logit_scale.cpu(),
            "state_dict": {name: value.cpu() for name, value in learned.items()},
        },
    )


def load_student(path: Path, allow_download: bool = False) -> tuple[Student, StudentRecord]:
    """The student of a checkpoint, on the CPU and in evaluation mode, and its record.

    allow_download: download files that the file refers to and no cache has, such as the backbone of a prompts-only
    student. Raises CheckpointError for a file that is not a student, ModelError if the backbone of a prompts-only
    student could not be built.
    """
    record, data = _read_student(path)
    settings = record.recipe.student
    _check_described_size(path, settings, data["state_dict"])
    with downloads.forbidden(unless=allow_download):
        # A student trained in full holds every weight, so its initial weights are not needed.
        # `weights` may name the student that this one continued from; its own backbone is on record.
        initial = settings.model_copy(update={"weights": record.backbone.weights})
        tower = build_image_tower(initial, load_weights=settings.train == "prompts")
    if settings.train == "prompts" and state_sha256(tower.module) != record.backbone_sha256:
        raise CheckpointError(
            f"its prompts were not trained on the current weights of {initial.weights or initial.arch}, but on "
            f"different ones (sha256 of their tensors: {record.backbone_sha256})",
            path=path,
            remedy="restore the weights that it was trained with",
        )
    vectors = data["class_vectors"].float()
    try:
        student = Student(
            tower.module,
            tower.width,
            vectors[: len(record.trained_classes)],
            data["logit_scale"].float(),
            settings,
            record.recipe.loss.edu_attention,
        )
        student.load_learned_state(data["state_dict"])
        student.add_classes(vectors[len(record.trained_classes) :])
    except ComkdError:
        raise
    except Exception as error:  # any shape of damaged content
        found = differences_in_error(error)
        reason = f"compared to the student of its own recipe, it {found}" if found else repr(error)
        raise CheckpointError(f"is a damaged student checkpoint: {reason}", path=path) from error
    return student.eval(), record


def _check_described_size(path: Path, settings: StudentSettings, state: dict[str, Tensor]) -> None:
    """Raise CheckpointError for a small file that describes a huge model, before that is built.

    A student that was trained in full stores every weight.
    """
    described = weights_of_transformer((settings.config or {}).get("vision_cfg"))
    stored = sum(tensor.numel() for tensor in state.values())
    if settings.train == "full" and described > 4 * stored + SMALL_WEIGHTS:
        raise CheckpointError(
            "is a damaged student checkpoint: it describes far more weights than it stores",
            path=path,
            found=f"about {described:,.0f}",
            allowed=f"{stored:,}",
        )


def load_student_record(path: Path) -> StudentRecord:
    """The record of a student.pt, without building the student. Raises CheckpointError."""
    return _read_student(path)[0]


def load_student_state(path: Path) -> tuple[StudentRecord, dict[str, Tensor]]:
    """The record of a student.pt and its learned tensors, without building the student. Raises CheckpointError."""
    record, data = _read_student(path)
    return record, data["state_dict"]


def is_student(path: Path) -> bool:
    """Whether a file is a student.pt, of this or a newer version; False for a file that could not be read."""
    found = saved_format(path)
    return found == STUDENT_FORMAT or is_newer_format(found, STUDENT_FORMAT)


def saved_format(path: Path) -> str | None:
    """The format that a file of plain data names, such as `comkd-student/1`; None for any other file.

    Nothing in the file is executed, and its tensors are not read.
    """
    if not zipfile.is_zipfile(path) or is_torchscript(path):  # the first also if there is no such file
        return None
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch and pickle raise many kinds for other files
        return None
    found = data.get("format") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def _read_student(path: Path) -> tuple[StudentRecord, dict[str, Any]]:
    data = load_plain(path, STUDENT_FORMAT, "a student")
    try:
        record = StudentRecord(
            recipe=parse_recipe(_with_holdout(data["recipe"]), name=f"{path}: recipe"),
            recipe_name=data["recipe_name"],
            source=data["source"],
            class_names=tuple(data["class_names"]),
            template=data["template"],
            preprocessing=checked_preprocessing(data["preprocessing"]),
            backbone=Origin(**data["backbone"]),
            backbone_sha256=data["backbone_sha256"],
            teacher=data["teacher"],
            identity=data["identity"],
            metrics=data["metrics"],
            identity_parts=mapping_or_none(data.get("identity_parts"), "identity_parts"),
            teacher_sha256=data.get("teacher_sha256"),
            templates=checked_texts(data.get("templates", ())),
            descriptions={str(name): checked_texts(texts) for name, texts in data.get("descriptions", {}).items()},
            classes_added=checked_texts(data.get("classes_added", ())),
            holdout=_holdout_or_none(mapping_or_none(data.get("holdout"), "holdout")),
        )
        if record.classes_added != record.class_names[len(record.trained_classes) :]:
            raise ValueError("classes_added should be the last of class_names")
        check_plain(data, ("recipe_name", "source", "template", "identity"), ("teacher", "backbone_sha256"))
        if not all(isinstance(part, str) for item in (record.teacher_sha256 or {}).items() for part in item):
            raise ValueError("teacher_sha256 should map names to digests")
        check_tensors(path, data, record.class_names)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"is a damaged student checkpoint: {reason_of(error)}", path=path) from error
    return record, data


def _with_holdout(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a checkpoint: without `data.holdout_percent` it is of a version that trained on every image."""
    return {**recipe, "data": {"holdout_percent": 0.0, **recipe["data"]}}


def _holdout_or_none(fields: dict[str, Any] | None) -> Holdout | None:
    if fields is None:
        return None
    holdout = Holdout(**fields)
    exceptions = mapping_or_none(holdout.exceptions, "holdout.exceptions") or {}
    if not isinstance(holdout.percent, int | float) or not all(isinstance(held, bool) for held in exceptions.values()):
        raise ValueError("holdout should be a share and exceptions")
    return holdout


def save_teacher(path: Path, saved: SavedTeacher) -> None:
    """Write teacher.pt atomically. Raises ComkdError."""
    save_plain(
        path,
        {
            "format": TEACHER_FORMAT,
            **asdict(saved.record),
            "class_names": list(saved.record.class_names),
            "class_vectors": saved.class_vectors.cpu(),
            "logit_scale": saved.logit_scale.cpu(),
            "state_dict": {name: value.cpu() for name, value in saved.state_dict.items()},
        },
    )


def load_teacher(path: Path) -> SavedTeacher:
    """Read teacher.pt. Raises CheckpointError for a file that is not an adapted teacher."""
    data = load_plain(path, TEACHER_FORMAT, "a teacher")
    try:
        record = TeacherRecord(
            key=data["key"],
            model=data["model"],
            class_names=tuple(data["class_names"]),
            template=data["template"],
            preprocessing=checked_preprocessing(data["preprocessing"]),
            origin=Origin(**data["origin"]),
            metrics=data["metrics"],
            backbone_sha256=data.get("backbone_sha256"),
            made_of=data.get("made_of"),
        )
        check_plain(data, ("key", "template"), ("backbone_sha256",))
        check_tensors(path, data, record.class_names)
        return SavedTeacher(record, data["class_vectors"], data["logit_scale"], data["state_dict"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"is a damaged teacher checkpoint: {reason_of(error)}", path=path) from error
