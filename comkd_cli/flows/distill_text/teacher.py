"""The teacher whose text encoder is distilled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comkd_cli.errors import CheckpointError
from comkd_cli.events import Report
from comkd_cli.files import sha256_of_data
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import bpe_merges, tokens_cut
from comkd_cli.models.checkpoints import StudentRecord, load_student
from comkd_cli.models.costs import text_parameters
from comkd_cli.teachers.of_student import SAME_VECTORS_COSINE, ClassEncoder, class_encoder

MOST_COMPARED = 64  # classes that are encoded again, to recognise the teacher


@dataclass(frozen=True)
class TextTeacher:
    """The student and the text half of its teacher."""

    student: Student
    record: StudentRecord
    encoder: ClassEncoder
    merges: str
    parameters: int
    """Of the text encoder."""

    @classmethod
    def load(cls, file: Path, device: torch.device, allow_download: bool, report: Report) -> TextTeacher:
        """Raises CheckpointError, also if the teacher is another one, and ModelError."""
        student, record = load_student(file, allow_download)
        encoder = class_encoder(record, file, allow_download, report)
        classes = record.trained_classes[:MOST_COMPARED]
        own = student.class_vectors[: len(classes)]
        found = encoder.vectors(classes)
        cosine = float(nn.functional.cosine_similarity(found, own).min()) if found.shape == own.shape else float("nan")
        if not cosine >= SAME_VECTORS_COSINE:
            raise CheckpointError(
                "the student's class vectors do not match its teacher's text encoder, so this text encoder cannot "
                "be distilled for the student",
                path=file,
                found=f"smallest cosine {cosine:.4f}",
                allowed=f"at least {SAME_VECTORS_COSINE}",
                remedy="restore the teacher that the student was distilled from, or distil a new student",
            )
        merges = bpe_merges(encoder.clip)
        encoder.move_to(device)
        return cls(student, record, encoder, merges, text_parameters(encoder.clip.model))

    @property
    def class_vectors(self) -> np.ndarray:
        """float32 (classes, dim), of the classes that the student was trained on."""
        return self.student.class_vectors[: len(self.record.trained_classes)].cpu().numpy()

    @property
    def token_embedding(self) -> Tensor | None:
        """The vectors of its tokens, (tokens, width), on the CPU; None if open_clip keeps them under another name."""
        model: Any = self.encoder.clip.model
        table = getattr(getattr(model, "text", model), "token_embedding", None)
        return None if table is None else table.weight.detach().cpu()

    @property
    def key(self) -> str:
        """A digest of what the teacher's vectors depend on."""
        record = self.record
        made_of = [record.recipe.teacher.model_dump(mode="json"), record.teacher_sha256, list(record.trained_classes)]
        return sha256_of_data([*made_of, self.class_vectors.tobytes().hex()])


def fits(encoder: ClassEncoder, name: str) -> bool:
    """Whether the teacher truncates no prompt of a name. The prompt of the most tokens need not be the longest text."""
    return not any(tokens_cut(encoder.clip, encoder.prompts.of(name)))
