"""The projector: from the width of the student's backbone to the width of the teacher's embedding."""

from __future__ import annotations

from torch import nn


def projector(student_width: int, teacher_width: int, layers: int) -> nn.Sequential:
    """P of u_s = P(z_s): (batch, student_width) to (batch, teacher_width).

    Two layers are PromptKD's: Linear, BatchNorm, ReLU, Linear, the hidden width being the teacher's. One
    is only a Linear; each further one adds another hidden Linear, BatchNorm, ReLU.
    """
    parts: list[nn.Module] = []
    width = student_width
    for _ in range(layers - 1):
        parts += [nn.Linear(width, teacher_width), nn.BatchNorm1d(teacher_width), nn.ReLU()]
        width = teacher_width
    return nn.Sequential(*parts, nn.Linear(width, teacher_width))
