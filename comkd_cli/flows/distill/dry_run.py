"""What a run would do and what its models cost, without training, fetching or writing anything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from comkd_cli.errors import CheckpointError
from comkd_cli.flows.distill.run import Run, finished
from comkd_cli.flows.distill.stage_2 import build_student
from comkd_cli.models.backbones import outline_clip, outline_image_tower
from comkd_cli.models.costs import multiply_adds, parameters
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.model import PromptSrcAdapt, Teacher
from comkd_cli.runtime.imports import without_compiler
from comkd_cli.teachers.prompted import prompted_clip
from comkd_cli.training.checkpoint import has_checkpoint


@dataclass(frozen=True)
class Outline:
    """What the models of a recipe cost."""

    classes: int
    teacher_parameters: int
    teacher_image_tower_parameters: int
    teacher_multiply_adds: int
    """Of its image tower for one image."""
    teacher_dim: int
    """Of its features."""
    student_image_tower_parameters: int
    student_trainable_parameters: int
    student_multiply_adds: int
    """Of its image tower for one image."""


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    folder: Path
    steps_per_epoch: int
    state: str
    """The state of the run's files: new, to be resumed, finished, or another run's."""


@dataclass(frozen=True)
class _TeacherOutline:
    parameters: int
    image_tower_parameters: int
    multiply_adds: int
    dim: int


@without_compiler()
def outline(recipe: Recipe, classes: int) -> Outline:
    """What the recipe's models cost; they are built without weights, so that nothing is fetched. Raises ModelError."""
    teacher = _outline_teacher(recipe.teacher.model_dump_json())
    with torch.device("meta"):
        tower = outline_image_tower(recipe.student)
        student = build_student(recipe, tower, torch.zeros(classes, teacher.dim), torch.ones(()))
    return Outline(
        classes=classes,
        teacher_parameters=teacher.parameters,
        teacher_image_tower_parameters=teacher.image_tower_parameters,
        teacher_multiply_adds=teacher.multiply_adds,
        teacher_dim=teacher.dim,
        student_image_tower_parameters=parameters(student),
        student_trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        student_multiply_adds=multiply_adds(student, tower.preprocessing.size),
    )


@cache
def _outline_teacher(settings: str) -> _TeacherOutline:
    """settings: a Teacher as JSON, which a cache can compare. The runs of a plan for many datasets share it."""
    teacher = Teacher.model_validate_json(settings)
    clip = outline_clip(teacher)
    tokens = clip.tokenize(["a photo of a thing."]).to("meta")
    dim = int(clip.model.encode_text(tokens).shape[-1])  # type: ignore[operator]
    if isinstance(teacher.adapt, PromptSrcAdapt):
        with torch.device("meta"):
            prompted_clip(clip, teacher.adapt.vision_depth, teacher.adapt.text_depth, teacher.adapt.tokens)
    tower: nn.Module = clip.model.visual  # type: ignore[assignment]
    return _TeacherOutline(
        parameters=parameters(clip.model),
        image_tower_parameters=parameters(tower),
        multiply_adds=multiply_adds(tower, clip.preprocessing.size),
        dim=dim,
    )


def plan(run: Run) -> Plan:
    """What the run would do. Raises DataError or TrainingError."""
    run.check_images()
    run.check_steps()
    return Plan(folder=run.folder, steps_per_epoch=len(run.source.train) // run.batch_size, state=_state_of(run))


def _state_of(run: Run) -> str:
    try:
        if finished(run):
            return "finished; --fresh repeats it"
        return "will resume from a checkpoint" if has_checkpoint(run.folder, run.identity) else "new"
    except CheckpointError as error:  # of another run: the rest of the plan is still of use
        return f"refused: {error}"
