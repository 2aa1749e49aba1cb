"""A teacher as it is scored, and the digest that its features and scores are kept by."""

from __future__ import annotations

import torch

from comkd_cli.evaluation.subjects import Subject, teacher_subject
from comkd_cli.files import sha256_of_data, sha256_of_file
from comkd_cli.models.backbones import weights_sha256
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers.loading import ReadyTeacher


def scored_teacher(ready: ReadyTeacher, settings: Teacher, device: torch.device) -> Subject:
    """A teacher that was loaded, from teacher.pt or by a recipe's settings."""
    if ready.checkpoint is not None:
        name, identity = str(ready.checkpoint), sha256_of_file(ready.checkpoint)
    else:
        name = ":".join(part for part in (settings.arch or "inline model", settings.weights) if part)
        identity = weights_digest(settings)
    return teacher_subject(ready.teacher, ready.preprocessing, identity, name, "teacher", device)


def weights_digest(model: Model) -> str:
    """A digest of the weights that a model loads."""
    parts = [model.arch, model.config, model.weights, weights_sha256(model)]
    if isinstance(model, Teacher) and model.format != "clip":
        parts.append(model.format)
    return sha256_of_data(parts)
