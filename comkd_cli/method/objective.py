"""The student's objective: L = w_kd * L_kd + w_align * L_align, each term by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from comkd_cli import processes
from comkd_cli.method.if_align import if_align
from comkd_cli.method.refinement import refinement
from comkd_cli.method.student import StudentOutput
from comkd_cli.method.teacher import TeacherOutput
from comkd_cli.recipe.model import Loss


def loss_terms(student: StudentOutput, teacher: TeacherOutput, loss: Loss) -> dict[str, Tensor]:
    """The weighted terms that the recipe leaves on; the objective is their sum.

    With `if_align` and `edu_attention` off, what is left is PromptKD's objective.
    """
    terms = {}
    if loss.refinement is not None:
        divergence = refinement(student.logits, teacher.logits, loss.refinement.temperature)
        terms["refinement"] = loss.refinement.weight * divergence
    if loss.if_align is not None:
        aligned = functional.normalize(student.projected.float(), dim=-1)
        terms["if_align"] = loss.if_align.weight * if_align(aligned, teacher.features)
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
    everywhere = processes.gathered(squares)
    norms = {name: math.sqrt(sum(part[name] for part in everywhere)) for name in squares}
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}
