"""What is scored: a student, a teacher or a plain CLIP, each as an image encoder and a classifier on its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from comkd_cli.edge.images import Preprocessing
from comkd_cli.evaluation.features import Encoder
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import Teacher
from comkd_cli.models.checkpoints import StudentRecord
from comkd_cli.models.costs import parameters
from comkd_cli.results.records import Role

IMAGES_AT_ONCE = 8192


@dataclass(frozen=True)
class Subject:
    """A model that predicts classes. Its image features can be stored; its predictions are derived from them."""

    model: str
    """Its name in the results."""
    role: Role
    seed: int | None
    parameters: int
    """Of its image tower."""
    module: nn.Module
    """From prepared images (batch, 3, size, size) to an answer or to features: what its costs are counted of."""
    encoder: Encoder
    class_vectors: Tensor
    """(classes, dim) of the dataset that it is scored on, L2-normalised, on the CPU."""
    logit_scale: float
    attend: Callable[[Tensor, Tensor], Tensor]
    """From the encoder's features (images, dim) and class vectors to L2-normalised features (images, dim)."""
    selection: str = "last"
    """How the epoch was selected."""

    def features(self, encoded: np.ndarray, classes: Sequence[int]) -> Tensor:
        """L2-normalised features of images for a label set, (images, dim).

        encoded: features from the encoder, (images, dim). classes: the labels that can be predicted.
        """
        vectors = self.class_vectors[list(classes)]
        with torch.no_grad():
            parts = [self.attend(part, vectors) for part in torch.split(torch.from_numpy(encoded), IMAGES_AT_ONCE)]
        return torch.cat(parts) if parts else torch.empty(0, vectors.shape[1])

    def predict(self, encoded: np.ndarray, classes: Sequence[int]) -> np.ndarray:
        """The most likely of `classes` for each image, as labels, (images,). encoded: as in `features`."""
        similarity = self.features(encoded, classes) @ self.class_vectors[list(classes)].T
        predicted: np.ndarray = np.asarray(classes)[similarity.argmax(dim=1).numpy()]
        return predicted


def student_subject(
    student: Student, record: StudentRecord, identity: str, model: str, device: torch.device
) -> Subject:
    """A student from its checkpoint. identity: a digest of the file. model: its name in the results."""
    subject = live_student(student, record.preprocessing, device)
    return replace(
        subject,
        model=model,
        seed=record.recipe.seed,
        selection=record.recipe.selection,
        encoder=replace(subject.encoder, identity=identity),
    )


def live_student(student: Student, preprocessing: Preprocessing, device: torch.device) -> Subject:
    """A student with its current weights, also during training; sets it to evaluation mode.

    Its encoder ends at the projector, since EduAttention may depend on the label set.
    """
    student.to(device).eval()
    return Subject(
        model="",
        role="student",
        seed=None,
        parameters=parameters(student),
        module=student,
        encoder=Encoder("", preprocessing, student.project),
        class_vectors=student.class_vectors.cpu().clone(),
        logit_scale=float(student.logit_scale),
        attend=lambda encoded, vectors: student.attend(encoded.to(device), vectors.to(device)).cpu(),
    )


def teacher_subject(
    teacher: Teacher, preprocessing: Preprocessing, identity: str, model: str, role: Role, device: torch.device
) -> Subject:
    """A teacher or a plain CLIP. identity: a digest of its weights. model: its name in the results."""
    teacher.to(device)
    subject = live_teacher(teacher.image_tower, teacher.class_vectors, teacher.logit_scale, preprocessing)
    return replace(subject, model=model, role=role, encoder=replace(subject.encoder, identity=identity))


def live_teacher(
    image_tower: nn.Module, class_vectors: Tensor, logit_scale: Tensor, preprocessing: Preprocessing
) -> Subject:
    """A teacher with its current weights, also during training; its features do not depend on the label set.

    The image tower must be in evaluation mode. class_vectors: (classes, dim), L2-normalised.
    """
    return Subject(
        model="",
        role="teacher",
        seed=None,
        parameters=parameters(image_tower),
        module=image_tower,
        encoder=Encoder("", preprocessing, image_tower),
        class_vectors=class_vectors.cpu().clone(),
        logit_scale=float(logit_scale),
        attend=lambda encoded, _vectors: nn.functional.normalize(encoded, dim=-1),
    )
