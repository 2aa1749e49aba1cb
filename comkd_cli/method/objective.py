"""The student's objective: a weighted sum of the terms that the recipe leaves on, each by name."""

from __future__ import annotations

import math

import torch
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
from comkd_cli.runtime import collectives

NO_LABELS = "loss.labels needs labelled training images, and these have no labels; set loss.labels to null"


def loss_terms(
    student: StudentOutput, teacher: TeacherOutput | None, loss: Loss, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """The weighted terms that the recipe leaves on; the objective is their sum.

    teacher: None where no term compares with it (`Loss.needs_teacher`). labels: (batch,) int64, for `loss.labels`.
    With `if_align` and `edu_attention` off, and nothing added, what is left is PromptKD's objective.
    """
    terms = {} if teacher is None else _taught_terms(student, teacher, loss)
    if loss.labels is not None:
        if labels is None:
            raise DataError(NO_LABELS)
        terms["labels"] = loss.labels.weight * labels_loss(student.logits, labels)
    return terms


def _taught_terms(student: StudentOutput, teacher: TeacherOutput, loss: Loss) -> dict[str, Tensor]:
    """The terms that compare the student with its teacher; those of features look at n(u_s)."""
    terms = {}
    if loss.refinement is not None:
        divergence = refinement(student.logits, teacher.logits, loss.refinement.temperature)
        terms["refinement"] = loss.refinement.weight * divergence
    compared = {"if_align": if_align, "feature_mse": feature_mse, "feature_cosine": feature_cosine}
    chosen = {name: settings for name in compared if (settings := getattr(loss, name)) is not None}
    if chosen:
        projected = functional.normalize(student.projected.float(), dim=-1)
        terms |= {name: term.weight * compared[name](projected, teacher.features) for name, term in chosen.items()}
    return terms


def gradient_shares(terms: dict[str, Tensor], projected: Tensor) -> dict[str, float]:
    """How much of the pull on the student's projected features each term has, summing to 1.

    Weights say little of it: at weight 1000, KL / (batch * classes) can pull less or far more than the
    alignment at weight 1. projected: StudentOutput.projected, (batch, dim). Measured as the share of the
    summed L2 norms of the terms' gradients there, those of all processes; leaves the graph for the backward pass.
    """
    squares = {}
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, projected, retain_graph=True, allow_unused=True)
        squares[name] = 0.0 if gradient is None else float(gradient.square().sum())
    everywhere = collectives.all_gather(squares)
    norms = {name: math.sqrt(sum(part[name] for part in everywhere)) for name in squares}
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}
