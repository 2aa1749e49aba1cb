"""Which teacher and which student `comkd init` proposes: the largest candidate that keeps to the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch

from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import ModelError
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_image_tower, outline_image_tower
from comkd_cli.models.candidates import (
    STUDENTS,
    TEACHERS,
    StudentCandidate,
    student_is_local,
    teacher_is_local,
    teacher_model,
    untrained_teacher,
)
from comkd_cli.models.costs import parameters
from comkd_cli.recipe import model as recipe
from comkd_cli.recipe.model import Model

SIZES = (64, 128, 224)  # of images, in pixels, that are proposed for towers that accept any size
MOST_FOR_UNTRAINED = 128
SHARE_OF_TEACHER = 10  # without a limit the student has at most a tenth of the teacher's parameters
REASON_GPU = "The teacher of the paper's pair."
REASON_CPU = "The smaller of two, since no GPU was found; ViT-L-14-quickgelu takes 4.6 times the multiply-adds."
LEAST_RATIO = 2  # of teacher to student, below which distilling makes nothing much smaller


@dataclass(frozen=True)
class Limit:
    """What the student may cost; at most one of the two is given."""

    parameters: int | None = None
    """Of the whole student: image tower, projector and EduAttention."""
    milliseconds: float | None = None
    """For one image in onnxruntime, on one thread of this machine."""


@dataclass(frozen=True)
class ChosenTeacher:
    """A teacher for a recipe."""

    name: str
    model: Model
    image_tower_parameters: int
    dim: int
    """Of its features."""
    has_weights: bool
    """Whether it starts from trained weights."""
    reason: str


@dataclass(frozen=True)
class ChosenStudent:
    """A student for a recipe."""

    name: str
    config: dict[str, object]
    image_size: int
    parameters: int
    pretrained: bool
    milliseconds: float | None
    reason: str


def proposed_image_size(short_side: int) -> int:
    """The side of a tower's input, in pixels: at least twice the short side of the images, or the largest."""
    return next((size for size in SIZES if size >= 2 * short_side), SIZES[-1])


def given_teacher(argument: str) -> ChosenTeacher:
    """The teacher that a user names as ARCH:WEIGHTS, a tag or a file. Raises ModelError."""
    arch, _, weights = argument.partition(":")
    if not arch or not weights:
        allowed = "ARCH:WEIGHTS, such as ViT-B-32:laion2b_s34b_b79k, or ARCH:FILE"
        raise ModelError("is not a teacher", found=argument, allowed=allowed)
    if not Path(weights).expanduser().is_file() and not open_clip.get_pretrained_cfg(arch, weights):
        tags = open_clip.list_pretrained_tags_by_model(arch)
        problem = "weights of the teacher are neither a file nor a tag of the architecture"
        raise ModelError(problem, field=arch, found=weights, allowed=tags or None)
    return _outlined(argument, Model(arch=arch, weights=weights), "Chosen with --teacher.")


def choose_teacher(labelled: bool, gpu: bool, image_size: int, download: bool) -> ChosenTeacher:
    """A teacher for this machine and these images. download: whether weights that are not here may be fetched later.

    Raises ModelError if there are neither weights nor labels to train a teacher on.
    """
    order = TEACHERS[::-1] if gpu else TEACHERS
    for candidate in order:
        if not download and not teacher_is_local(candidate):
            continue
        reason = REASON_GPU if gpu else REASON_CPU
        fetched = "" if teacher_is_local(candidate) else " The first run downloads its weights."
        return _outlined(f"{candidate.arch}:{candidate.weights}", teacher_model(candidate), reason + fetched)
    if not labelled:
        raise ModelError(
            "no weights of a teacher are in the cache of this machine, and images without labels cannot train one",
            allowed=", ".join(f"{candidate.arch}:{candidate.weights}" for candidate in TEACHERS),
            remedy="leave out --no-download, or specify a file with --teacher ARCH:FILE",
        )
    model = Model(config=untrained_teacher(min(image_size, MOST_FOR_UNTRAINED)))
    reason = (
        "No CLIP weights are in the cache of this machine. This small CLIP knows only what it learns from "
        "your labels, as in recipes/cifar10.yaml; a pretrained teacher would know more."
    )
    return _outlined("a small CLIP from scratch", model, reason)


def _outlined(name: str, model: Model, reason: str) -> ChosenTeacher:
    tower = outline_image_tower(model)
    return ChosenTeacher(name, model, parameters(tower.module), tower.width, model.has_weights, reason)


@dataclass(frozen=True)
class StudentChooser:
    """Chooses a student for a teacher."""

    teacher: ChosenTeacher
    classes: int
    image_size: int
    """For towers that accept any size."""
    download: bool
    """Whether weights that are not here may be fetched later."""
    measure: Callable[[Student, Preprocessing], float]
    """Milliseconds of a student with random weights for one image."""

    def choose(self, limit: Limit) -> ChosenStudent:
        """The largest candidate within the limit. Raises ModelError, with the nearest one, if none is."""
        most = self.teacher.image_tower_parameters // LEAST_RATIO
        if limit.parameters is not None:
            most = min(most, limit.parameters)
        elif limit.milliseconds is None:
            most = min(most, self.teacher.image_tower_parameters // SHARE_OF_TEACHER)
        tried: list[str] = []
        for candidate in STUDENTS:
            settings = self._settings(candidate)
            count = parameters(self._student(settings, outline=True)[0])
            if count > most:
                tried.append(f"{candidate.base_name} {count / 1e6:.1f} M parameters")
                continue
            milliseconds = None
            if limit.milliseconds is not None:
                milliseconds = self.measure(*self._student(settings, outline=False))
                if milliseconds > limit.milliseconds:
                    tried.append(f"{candidate.base_name} {milliseconds:.1f} ms")
                    continue
            return self._chosen(candidate, count, milliseconds, self._reason(limit, most, tried, milliseconds))
        raise ModelError(
            "no candidate for the student is within the limit",
            found=tried[-1],
            allowed=f"{limit.milliseconds:g} ms" if limit.milliseconds is not None else f"{most:,} parameters",
            remedy="raise the limit" if most == limit.parameters or limit.milliseconds else "choose a larger --teacher",
        )

    def _reason(self, limit: Limit, most: int, tried: list[str], milliseconds: float | None) -> str:
        larger = f" Larger ones: {'; '.join(tried)}." if tried else ""
        if milliseconds is not None:
            return (
                f"The largest candidate within {limit.milliseconds:g} ms an image: {milliseconds:.1f} ms in "
                "onnxruntime on one thread of this machine, with random weights, the median of the fastest of three "
                f"rounds.{larger}"
            )
        if most == limit.parameters:
            return f"The largest candidate within {most:,} parameters.{larger}"
        share = SHARE_OF_TEACHER if limit.parameters is None else LEAST_RATIO
        given = "; --budget or --max-latency choose another" if limit.parameters is None else ""
        return f"The largest candidate with at most 1/{share} of the teacher's image tower{given}.{larger}"

    def _settings(self, candidate: StudentCandidate) -> recipe.Student:
        return recipe.Student(train="full", config=candidate.config(self.image_size, pretrained=False))

    def _student(self, settings: recipe.Student, outline: bool) -> tuple[Student, Preprocessing]:
        """The whole student: on the meta device, or with random weights."""
        tower = outline_image_tower(settings) if outline else build_image_tower(settings, load_weights=False)
        with torch.device("meta" if outline else "cpu"):
            vectors, scale = torch.zeros(self.classes, self.teacher.dim), torch.ones(())
            return Student(tower.module, tower.width, vectors, scale, settings, None), tower.preprocessing

    def _chosen(
        self, candidate: StudentCandidate, count: int, milliseconds: float | None, reason: str
    ) -> ChosenStudent:
        local = student_is_local(candidate)
        pretrained = local or self.download
        config = candidate.config(self.image_size, pretrained)
        if pretrained:
            reason += " It starts from ImageNet weights" + (
                " in the cache." if local else ", which the first run downloads."
            )
        else:
            reason += " Its ImageNet weights are not in the cache of this machine, so it starts from scratch."
        size = int(config["vision_cfg"]["image_size"])
        return ChosenStudent(candidate.base_name, config, size, count, pretrained, milliseconds, reason)
