"""Refinement: the divergence of the student's class probabilities from the teacher's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations keep the dtype of their inputs; the meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def class_logits(features: Tensor, class_vectors: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosine similarity of images and classes: s * f W^T, (batch, classes).

    features: (batch, dim); class_vectors: (classes, dim); both L2-normalised. Computed in float32 under
    autocast too: at a scale of 100, half precision would round logits to steps of 0.06 and more.
    """
    with without_autocast(features.device):
        return logit_scale.float() * features.float() @ class_vectors.float().T


def refinement(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), a scalar.

    Both (batch, classes). Summed over the classes and divided by batch * classes, as PromptKD's released
    code divides it, so that its published weights (1000; 200 for some datasets) mean the same here.
    """
    log_student = functional.log_softmax(student_logits / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * temperature**2 / student_logits.numel()
