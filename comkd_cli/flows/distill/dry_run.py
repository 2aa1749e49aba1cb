"""What a run would do and what its models cost, without training, fetching or writing anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from comkd_cli.errors import CheckpointError
from comkd_cli.flows.distill.run import Run, finished
from comkd_cli.flows.distill.stage_2 import build_student
from comkd_cli.models.backbones import outline_clip, outline_image_tower
from comkd_cli.models.costs import multiply_adds, parameters
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.model import PromptSrcAdapt
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
    """Of the run's files: new, to be resumed, finished, or another run's."""


def outline(recipe: Recipe, classes: int) -> Outline:
    """What the recipe's models cost; they are built without weights, so that nothing is fetched. Raises ModelError."""
    clip = outline_clip(recipe.teacher)
    adapt = recipe.teacher.adapt
    tokens = clip.tokenize(["a photo of a thing."]).to("meta")
    dim = int(clip.model.encode_text(tokens).shape[-1])  # type: ignore[operator]
    with torch.device("meta"):
        if isinstance(adapt, PromptSrcAdapt):
            prompted_clip(clip, adapt.vision_depth, adapt.text_depth, adapt.tokens)
        tower = outline_image_tower(recipe.student)
        student = build_student(recipe, tower, torch.zeros(classes, dim), torch.ones(()))
    teacher_tower: nn.Module = clip.model.visual  # type: ignore[assignment]
    return Outline(
        classes=classes,
        teacher_parameters=parameters(clip.model),
        teacher_image_tower_parameters=parameters(teacher_tower),
        teacher_multiply_adds=multiply_adds(teacher_tower, clip.preprocessing.size),
        teacher_dim=dim,
        student_image_tower_parameters=parameters(student),
        student_trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        student_multiply_adds=multiply_adds(student, tower.preprocessing.size),
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
