"""Stage 2's objective: the weighted sum of refinement, IFAlign and the other terms that the recipe has on."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from comkd_cli.errors import DataError
from comkd_cli.method.feature_cosine import feature_cosine
from comkd_cli.method.feature_mse import feature_mse
from comkd_cli.method.if_align import if_align
from comkd_cli.method.labels import labels_loss
from comkd_cli.method.refinement import refinement
from comkd_cli.method.student import StudentOutput
from comkd_cli.method.teacher import TeacherOutput
from comkd_cli.recipe.model import Loss


def loss_terms(
    student: StudentOutput, teacher: TeacherOutput | None, loss: Loss, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """The weighted terms of the recipe by name, scalars; the objective is their sum.

    L = w_r * tau^2 KL(teacher || student) + w_a * (L_mean + L_var)  (ComKD-CLIP, arXiv 2408.04145), plus the terms of
    other methods that the recipe has on. Without `if_align` and `edu_attention` it is PromptKD's objective.

    teacher: None if no term compares with it (`Loss.needs_teacher`). labels: (batch,) int64, for `loss.labels`; -1
    for an image without a label.
    Raises DataError if the labels that it needs are missing.
    """
    terms = {} if teacher is None else _distillation_terms(student, teacher, loss)
    if loss.labels is not None:
        if labels is None:
            raise labels_missing()
        terms["labels"] = loss.labels.weight * labels_loss(student.logits, labels)
    return terms


def labels_missing(dataset: str | None = None) -> DataError:
    """The error for `loss.labels` if the training images have no labels."""
    return DataError("the training images have no labels", path=dataset, field="loss.labels", remedy="set it to null")


def _distillation_terms(student: StudentOutput, teacher: TeacherOutput, loss: Loss) -> dict[str, Tensor]:
    """The terms that compare the student with its teacher; those of features compare n(u_s) with n(u_t)."""
    terms = {}
    if loss.refinement is not None:
        divergence = refinement(student.logits, teacher.logits, loss.refinement.temperature)
        terms["refinement"] = loss.refinement.weight * divergence
    if loss.if_align is None and loss.feature_mse is None and loss.feature_cosine is None:
        return terms
    projected = functional.normalize(student.projected.float(), dim=-1)
    if loss.if_align is not None:
        terms["if_align"] = loss.if_align.weight * if_align(projected, teacher.features)
    if loss.feature_mse is not None:
        terms["feature_mse"] = loss.feature_mse.weight * feature_mse(projected, teacher.features)
    if loss.feature_cosine is not None:
        terms["feature_cosine"] = loss.feature_cosine.weight * feature_cosine(projected, teacher.features)
    return terms
