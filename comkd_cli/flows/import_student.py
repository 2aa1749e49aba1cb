"""A student of PromptKD's code as a student.pt, without training: `comkd import-student`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from comkd_cli.data.source import Source
from comkd_cli.errors import CheckpointError, ModelError, RecipeError
from comkd_cli.events import Report, Stage
from comkd_cli.files import sha256_of_file
from comkd_cli.method.prompts import VisionPrompts
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import ImageTower, build_image_tower
from comkd_cli.models.checkpoints import StudentRecord, save_student
from comkd_cli.models.costs import parameters
from comkd_cli.models.weights import differences
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.identity import Identity, recipe_settings
from comkd_cli.recipe.model import Prompts
from comkd_cli.teachers.loading import ReadyTeacher
from comkd_cli.teachers.promptkd_checkpoint import ReleasedStudent, read_released_student


def import_student(
    recipe: Recipe, name: str, source: Source, ready: ReadyTeacher, target: Path, report: Report
) -> StudentRecord:
    """Write the student of `student.weights` to `target`, with the class vectors of its teacher.

    The file holds every weight, so the student.pt does, too: its recipe has `train: full`. The logit scale is the
    file's own, as PromptKD's code scores with it. name: of the recipe. source: whose classes it answers. Raises
    RecipeError for a recipe without such a student, CheckpointError for a file that does not hold one or a target that
    exists, ModelError if the file does not fit the architecture or the teacher.
    """
    settings = recipe.student
    if settings.format != "promptkd":
        raise RecipeError(
            "is not a released student", field="student.format", found=settings.format, allowed=["promptkd"]
        )
    if target.exists():
        raise CheckpointError(
            "exists already", path=target, remedy="delete its folder first, or choose another --runs folder"
        )
    path = Path(str(settings.weights)).expanduser()
    report(Stage(f"Student: {path}"))
    released = read_released_student(path)
    tower = _tower(recipe, released, path)
    imported = _imported_recipe(recipe, released)
    student = _student(imported, tower, released, ready, path)
    parts = {
        "recipe": recipe_settings(imported),
        "data": {"class_names": list(source.class_names), "template": source.template},
        "student": {"weights_sha256": sha256_of_file(path)},
        "teacher": dict(ready.sha256),
    }
    record = StudentRecord(
        recipe=imported,
        recipe_name=name,
        source=source.name,
        class_names=source.class_names,
        template=source.template,
        templates=source.wording.templates,
        descriptions=dict(source.wording.descriptions),
        preprocessing=tower.preprocessing,
        backbone=tower.origin,
        backbone_sha256=None,
        teacher=os.path.relpath(ready.checkpoint, target.parent) if ready.checkpoint else None,
        identity=Identity(parts).digest,
        identity_parts=parts,
        metrics={},
        teacher_sha256=dict(ready.sha256),
        holdout=source.holdout,
    )
    save_student(target, student, record)
    report(Stage(f"Imported {parameters(student):,} parameters"))
    return record


def _tower(recipe: Recipe, released: ReleasedStudent, path: Path) -> ImageTower:
    """The recipe's image tower with the weights of the file."""
    initial = recipe.student.model_copy(update={"weights": None, "train": "full"})
    tower = build_image_tower(initial, load_weights=False)
    if tower.origin.activation != "quick_gelu":
        raise ModelError(
            "PromptKD's students are OpenAI CLIPs, which were trained with QuickGELU and lose accuracy without it",
            field="student.arch" if initial.arch else "student.config",
            found=tower.origin.architecture,
            remedy=f"use {f'{initial.arch}-quickgelu' if initial.arch else 'quick_gelu: true in its config'}",
        )
    _load(tower.module, released.tower_state, path, tower.origin.architecture)
    return tower


def _imported_recipe(recipe: Recipe, released: ReleasedStudent) -> Recipe:
    """The recipe of the student.pt: PromptKD's loss, and every weight in the file."""
    depth, tokens, _ = released.vision_tokens.shape
    prompts = Prompts(tokens=tokens, depth=depth) if tokens else None
    student = recipe.student.model_copy(update={"weights": None, "format": "clip", "train": "full", "prompts": prompts})
    loss = recipe.loss.model_copy(update={"if_align": None, "edu_attention": None})
    return recipe.model_copy(update={"student": student, "loss": loss})


def _student(recipe: Recipe, tower: ImageTower, released: ReleasedStudent, ready: ReadyTeacher, path: Path) -> Student:
    vectors = ready.teacher.class_vectors.cpu()
    width = released.projector_state["3.weight"].shape[0] if "3.weight" in released.projector_state else 0
    if width != vectors.shape[1]:
        raise ModelError(
            "the output width of its projector is not the embedding width of the recipe's teacher",
            path=path,
            found=width,
            allowed=[vectors.shape[1]],
            remedy="set teacher to the model that this student was distilled from",
        )
    student = Student(tower.module, tower.width, vectors, released.log_scale.exp(), recipe.student, None)
    _load(student.projector, released.projector_state, path, "PromptKD's projector")
    if isinstance(student.backbone, VisionPrompts):
        expected, found = student.backbone.tokens.shape, released.vision_tokens.shape
        if expected != found:
            raise ModelError(
                "its prompts do not have the width of the architecture's tokens",
                path=path,
                found=found[2],
                allowed=[expected[2]],
                remedy="set student.arch to the architecture that it was distilled on",
            )
        with torch.no_grad():
            student.backbone.tokens.copy_(released.vision_tokens)
    return student.eval()


def _load(module: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load every tensor of a module. Raises ModelError, naming what differs."""
    own = {key: value.shape for key, value in module.state_dict().items()}
    if found := differences(own, {key: value.shape for key, value in state.items()}):
        raise ModelError(f"does not hold weights of {name}: it {found}", path=path)
    module.load_state_dict(state)
