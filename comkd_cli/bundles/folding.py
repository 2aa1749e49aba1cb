"""A student without EduAttention if its gate is idle, so that a device skips a computation that changes nothing.

A small gate leaves little of f_e = u_s + alpha * softmax(q K^T / sqrt(c)) V, and most of that is the same for every
image, because softmax is nearly uniform over features of unit length: the projector's last bias absorbs it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from comkd_cli.bundles.gates import GATES
from comkd_cli.events import Notice, Report
from comkd_cli.method.student import Student

BATCH = 32
IDLE_GATE = 0.01
"""A gate below this, without its sign, may be idle: alpha of f_e = u_s + alpha * attention."""


@dataclass(frozen=True)
class Folding:
    """The gate of a student's EduAttention, and whether the graphs leave EduAttention out."""

    gate: float
    folded: bool
    difference_max: float | None = None
    """Largest |difference| of a feature without EduAttention, on real images; None if the gate is not small."""

    def words(self) -> str:
        """What happened to a small gate."""
        figures = f"EduAttention's gate is {self.gate:.2g}, max |difference| without it {self.difference_max:.2e}"
        return f"{figures}: {'the graphs leave it out' if self.folded else 'too large to leave it out'}"


def folding(student: Student, images: np.ndarray, features: np.ndarray, report: Report) -> Folding | None:
    """Whether a student's EduAttention can be left out; None if it has none.

    images: real ones, prepared, float32 (images, 3, size, size); features: the student's for them. It is left out if
    its gate is below IDLE_GATE and the features without it differ by at most half of the fp32 gate's limit.
    """
    gate = student.gate
    if gate is None:
        return None
    if abs(gate) >= IDLE_GATE:
        return Folding(gate, folded=False)
    with torch.inference_mode():
        parts = torch.split(torch.from_numpy(images), BATCH)
        projected = torch.cat([student.project(part) for part in parts]).float() + _constant(student)
    difference = float(np.abs(nn.functional.normalize(projected, dim=-1).numpy() - features).max())
    decision = Folding(gate, difference <= GATES["fp32"].difference_max / 2, difference)
    report(Notice(decision.words()))
    return decision


def folded(student: Student, decision: Folding | None) -> Student:
    """The student to export: itself, or a copy without EduAttention, whose projector adds `_constant`."""
    if decision is None or not decision.folded:
        return student
    alone = copy.deepcopy(student)
    *_, last = alone.projector.parameters()  # the bias of its last layer
    with torch.no_grad():
        last.add_(_constant(student))
    alone.edu_attention, alone.uses_candidates = None, False
    return alone


@torch.no_grad()
def _constant(student: Student) -> Tensor:
    """alpha times the mean of V, (dim,): what EduAttention adds to every image if its attention is uniform.

    Zero with `memory: candidates`, where V depends on the classes at hand.
    """
    attention = student.edu_attention
    if attention is None or student.uses_candidates:
        return torch.zeros(student.class_vectors.shape[1])
    mean: Tensor = attention.value(student.memory).mean(dim=0)
    return attention.gate * mean
