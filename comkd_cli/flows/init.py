"""A first recipe for a folder of images: what it holds, models that fit, and the reason of each setting."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from comkd_cli.bundles.graphs import export_image_encoder
from comkd_cli.bundles.latency import Contender, single_thread_timings
from comkd_cli.data.class_names import some
from comkd_cli.data.inspection import LONG_SHAPE, Inspection, inspect_folder
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import DataError, WriteError
from comkd_cli.events import Notice, Report, Stage, ignore_event
from comkd_cli.files import temporary_folder, write_error
from comkd_cli.method.student import Student
from comkd_cli.models.choice import (
    ChosenStudent,
    ChosenTeacher,
    Limit,
    StudentChooser,
    choose_teacher,
    given_teacher,
    proposed_image_size,
)
from comkd_cli.recipe.commented import Setting, commented_yaml, printable
from comkd_cli.recipe.loading import parse_recipe, read_yaml
from comkd_cli.recipe.model import DEFAULT_TEMPLATE, Data

MOST_BATCH = 128
LEAST_BATCH = 8
LEAST_STEPS_PER_EPOCH = 8
TARGET_STEPS = 5000
LEAST_EPOCHS, MOST_EPOCHS = 5, 100
CACHED_VIEWS = 8  # in docs/experiments.md 8 crops cost 0.9 points of top-1 in 40 epochs and 1.7 in 120, one crop 15.5
RATE_PRETRAINED, RATE_FROM_SCRATCH = 1e-4, 1e-3  # at a batch of MOST_BATCH
SCORES = 10  # of a run, about
SHOTS = 16


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    folder: Path
    classes: Path | None = None
    """A text file of class names, one a line."""
    limit: Limit = field(default_factory=Limit)
    download: bool = True
    """Whether the recipe may name weights that its first run has to fetch."""
    teacher: str | None = None
    """ARCH:WEIGHTS instead of the proposed one."""


@dataclass(frozen=True)
class Schedule:
    """How long the student is trained."""

    batch_size: int
    steps_per_epoch: int
    epochs: int


@dataclass(frozen=True)
class Proposal:
    """A recipe for a folder, and what it is based on."""

    inspection: Inspection
    teacher: ChosenTeacher
    student: ChosenStudent
    schedule: Schedule
    text: str
    """YAML, with a comment on each setting."""


def propose(request: Request, report: Report = ignore_event) -> Proposal:
    """Look at a folder and make a recipe for it; nothing is downloaded or written.

    Raises DataError for a folder that a recipe could not use, ModelError if no teacher or student fits.
    """
    report(Stage(f"Inspecting {request.folder}"))
    inspection = inspect_folder(request.folder, request.classes, report)
    image_size = proposed_image_size(inspection.sample.short_side)
    labelled = inspection.source.train.labels is not None
    if request.teacher is not None:
        teacher = given_teacher(request.teacher)
    else:
        teacher = choose_teacher(labelled, torch.cuda.is_available(), image_size, request.download)
    chooser = StudentChooser(
        teacher=teacher,
        classes=len(inspection.source.class_names),
        image_size=image_size,
        download=request.download,
        measure=lambda student, preprocessing: _milliseconds(student, preprocessing, report),
    )
    student = chooser.choose(request.limit)
    schedule = proposed_schedule(len(inspection.source.train))
    settings = _Settings(request, inspection, teacher, student, schedule).all()
    text = commented_yaml(settings, _head(inspection))
    parse_recipe(read_yaml(text, "the proposed recipe"), name="the proposed recipe")
    return Proposal(inspection, teacher, student, schedule, text)


def write_recipe(path: Path, text: str) -> None:
    """Write a new file. Raises WriteError if there is one already, and if the system refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise already_exists(path) from error
    except OSError as error:
        raise write_error(path, error) from error


def already_exists(path: Path) -> WriteError:
    """The error of a recipe that would be overwritten."""
    return WriteError("exists already", path=path, remedy="choose another file with --out, or move this one away")


def proposed_schedule(images: int) -> Schedule:
    """The batch size and epochs for this number of training images.

    The batch is the largest power of two up to MOST_BATCH with at least LEAST_STEPS_PER_EPOCH steps an epoch, and at
    least LEAST_BATCH; the epochs are as many as TARGET_STEPS need, within LEAST_EPOCHS and MOST_EPOCHS.
    """
    power = 2 ** int(math.log2(max(1, images // LEAST_STEPS_PER_EPOCH)))
    batch = min(images, max(LEAST_BATCH, min(MOST_BATCH, power)))
    steps = images // batch
    epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(TARGET_STEPS / steps)))
    return Schedule(batch, steps, epochs)


def _milliseconds(student: Student, preprocessing: Preprocessing, report: Report) -> float:
    """For one image in onnxruntime on one thread of this machine: the median of the fastest of several rounds."""
    with temporary_folder() as folder:
        graph = folder / "image_encoder.onnx"
        export_image_encoder(student.eval(), preprocessing, graph)
        seconds = single_thread_timings([Contender("student", graph)], preprocessing.size, {})["student"].fastest
    report(Notice(f"a student of {sum(p.numel() for p in student.parameters()):,} parameters: {1000 * seconds:.1f} ms"))
    return 1000 * seconds


def _head(inspection: Inspection) -> str:
    images = len(inspection.source.train)
    return (
        f"Proposed by comkd init for {printable(str(inspection.folder))}: {images:,} training images, "
        f"{len(inspection.source.class_names):,} classes.\n"
        "It runs as it is. Change what you know better; docs/recipes.md has every field."
    )


@dataclass(frozen=True)
class _Settings:
    """Makes the settings of a recipe with their reasons."""

    request: Request
    inspection: Inspection
    teacher: ChosenTeacher
    student: ChosenStudent
    schedule: Schedule

    def all(self) -> list[Setting]:
        return [
            Setting("about", f"{self._source.name}: {self.teacher.name} to {self.student.name}"),
            Setting("data", self._data()),
            Setting("augment", self._augment()),
            Setting("teacher", self._teacher(), self.teacher.reason),
            Setting("student", self._student(), self.student.reason),
            Setting("loss", self._loss()),
            Setting("optim", self._optim()),
            *self._cache(),
            *self._scores(),
        ]

    @property
    def _source(self) -> Any:
        return self.inspection.source

    @property
    def _labelled(self) -> bool:
        return self._source.train.labels is not None

    def _data(self) -> list[Setting]:
        settings = [Setting("folder", _recipe_path(self.request.folder), _folder_reason(self.inspection))]
        if self.request.classes is not None:
            reason = "One class a line; the line's position is the label."
            settings.append(Setting("classes", _recipe_path(self.request.classes), reason))
        elif self.inspection.listed_classes is not None:
            reason = "The class folders of all splits, because some splits lack a folder that another one has."
            if absent := self.inspection.untrained_classes:
                reason += f" No training images of: {some(absent)}."
            settings.append(Setting("classes", list(self.inspection.listed_classes), reason))
        reason = (
            "The general prompt. comkd does not know what the images show; if they all show one kind of thing, name "
            "it, as in: a photo of a {}, a type of animal."
        )
        settings.append(Setting("template", DEFAULT_TEMPLATE, reason))
        if self.inspection.source.test is None:
            reason = "There are no test images: this share, in percent, is held out of training, to measure scores on."
            settings.append(Setting("holdout_percent", Data.model_fields["holdout_percent"].default, reason))
        return settings

    def _augment(self) -> list[Setting]:
        crop = "Crops keep at least this share of the picture's area, as in the bundled recipes of compact students."
        flip = "Mirrors half of the crops. Set it to false if left and right matter, as in text."
        return [Setting("min_scale", 0.4, crop), Setting("flip", True, flip)]

    def _teacher(self) -> list[Setting]:
        model = self.teacher.model
        fields = [("arch", model.arch), ("weights", model.weights), ("config", model.config)]
        settings = [Setting(name, value) for name, value in fields if value is not None]
        return [*settings, self._adapt()]

    def _adapt(self) -> Setting:
        if not self._labelled:
            return Setting("adapt", "none", "The training images have no labels, so the teacher stays zero-shot.")
        if not self.teacher.has_weights:
            reason = "Trains the whole teacher on the labels (it has no weights), for as many epochs as the student."
            settings = [
                Setting("method", "full"),
                Setting("epochs", self.schedule.epochs),
                Setting("batch_size", self.schedule.batch_size),
                Setting("learning_rate", _rate(2 * RATE_FROM_SCRATCH, self.schedule.batch_size)),
            ]
            return Setting("adapt", settings, reason)
        if absent := self.inspection.untrained_classes:
            reason = f"Zero-shot: prompts cannot be learned for classes without training images ({some(absent)})."
            return Setting("adapt", "none", reason)
        reason = (
            f"Learns prompts for the teacher from up to {SHOTS} labelled images of each class (PromptSRC); with `none` "
            "it stays zero-shot and the first stage takes no time."
        )
        return Setting("adapt", [Setting("method", "promptsrc"), Setting("shots", SHOTS)], reason)

    def _student(self) -> list[Setting]:
        size = self.inspection.sample.short_side
        reason = f"The images have a median short side of {size} pixels; the student sees {self.student.image_size}."
        return [
            Setting("train", "full", "Every weight: a compact network has no room for prompts beside frozen weights."),
            Setting("config", self.student.config, reason),
        ]

    def _loss(self) -> list[Setting]:
        cosine = (
            "The direction of the teacher's feature of each image: the best objective in docs/experiments.md for a "
            "student that is trained in full, for thousands of steps. Alone, its weight does not matter to Adam."
        )
        return [
            Setting("refinement", None, "The teacher's class probabilities are matched through the features alone."),
            Setting("feature_cosine", [Setting("weight", 1.0)], cosine),
        ]

    def _optim(self) -> list[Setting]:
        schedule = self.schedule
        steps = schedule.epochs * schedule.steps_per_epoch
        epochs = (
            f"{schedule.steps_per_epoch:,} steps an epoch, {steps:,} in all. The rule: about {TARGET_STEPS:,} steps, "
            f"but {LEAST_EPOCHS} to {MOST_EPOCHS} epochs."
        )
        batch = (
            f"The largest power of two up to {MOST_BATCH} that leaves {LEAST_STEPS_PER_EPOCH} steps an epoch. "
            "Memory was not measured: if it is short, add accumulation_steps: 2."
        )
        start = "ImageNet weights" if self.student.pretrained else "random weights"
        both = f"{RATE_PRETRAINED:g} or {RATE_FROM_SCRATCH:g}"
        rate = f"For {start}: {both} at a batch of {MOST_BATCH}, in proportion to the batch's square root."
        base = RATE_PRETRAINED if self.student.pretrained else RATE_FROM_SCRATCH
        return [
            Setting("name", "adamw", "Every weight is trained; SGD is only for prompts."),
            Setting("epochs", schedule.epochs, epochs),
            Setting("batch_size", schedule.batch_size, batch),
            Setting("learning_rate", _rate(base, schedule.batch_size), rate),
        ]

    def _cache(self) -> list[Setting]:
        if not self.teacher.has_weights or torch.cuda.is_available() or self.schedule.epochs <= CACHED_VIEWS:
            return []
        reason = (
            f"No GPU was found: the large teacher sees {CACHED_VIEWS} crops of each image once; epochs repeat them. "
            "null runs it at every step, which is slower and a little better."
        )
        return [Setting("teacher_cache", [Setting("views", CACHED_VIEWS)], reason)]

    def _scores(self) -> list[Setting]:
        test = self._source.test
        every = max(1, self.schedule.epochs // SCORES)
        images = "held-out images" if test is None or not len(test) else f"{len(test):,} test images"
        return [Setting("evaluate_every_epochs", every, f"Scores the {images} about {SCORES} times.")]


def _folder_reason(inspection: Inspection) -> str:
    """What the folder holds that a reader of the recipe should know."""
    source, duplicates = inspection.source, inspection.duplicates
    parts = [f"{len(source.train):,} training images, {'labelled' if source.train.labels else 'unlabelled'}"]
    if source.test is not None and len(source.test):
        parts.append(f"{len(source.test):,} test images, {'labelled' if source.test.labels else 'unlabelled'}")
    else:
        parts.append("no test images, so a share of these is held out (below)")
    text = "; ".join(parts) + "."
    if duplicates.across_splits:
        text += f" {len(duplicates.across_splits):,} test images are also in train/: scores are optimistically biased."
    if duplicates.across_classes:
        copies = len(duplicates.across_classes)
        have = "copy of another image has" if copies == 1 else "copies of other images have"
        text += f" {copies:,} {have} another label."
    if inspection.sample.long_shapes:
        text += (
            f" {inspection.sample.long_shapes:,} of {inspection.sample.images:,} sampled images are at least "
            f"{LONG_SHAPE} times as long as wide; scoring looks at the square in their middle."
        )
    return text


def _recipe_path(path: Path) -> str:
    """A path as a recipe has it: relative as it was given, with a remedy for names that are not text."""
    text = os.fspath(path)
    if text.startswith("~"):  # which reading the recipe would expand
        text = str(path.resolve())
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError("is not UTF-8, which a recipe is", path=printable(text), remedy="rename it") from error
    return text


def _rate(base: float, batch_size: int) -> float:
    """Adam's learning rate, in proportion to the square root of the batch (Malladi et al., 2205.10287), two digits."""
    return float(f"{base * math.sqrt(batch_size / MOST_BATCH):.2g}")


def unreadable_files(inspection: Inspection) -> Sequence[str]:
    """`path: reason` of every file that is known to be unreadable, each once."""
    known = (*inspection.missing, *inspection.sample.unreadable)
    return tuple({line.partition(": ")[0]: line for line in reversed(known)}.values())[::-1]
