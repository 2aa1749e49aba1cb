"""The student that is exported, and its output in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.bundles.bundle import Head, check_head, class_list
from comkd_cli.bundles.graphs import CLASS_VECTORS
from comkd_cli.bundles.metadata import Origin
from comkd_cli.bundles.parity import Reference
from comkd_cli.bundles.parts import Part
from comkd_cli.errors import ExportError
from comkd_cli.events import Progress, Report, Stage
from comkd_cli.files import sha256_of_file
from comkd_cli.method.student import Student
from comkd_cli.models.checkpoints import StudentRecord, load_student

STUDENT_BATCH = 32


@dataclass(frozen=True)
class StudentToExport:
    """The student to export."""

    file: Path
    sha256: str
    student: Student
    record: StudentRecord
    head: Head

    @classmethod
    def load(cls, file: Path, allow_download: bool) -> StudentToExport:
        """Raises CheckpointError, ModelError, and ExportError if it cannot be exported."""
        student, record = load_student(file, allow_download)
        head = Head(student.class_vectors.numpy(), float(student.logit_scale))
        check_head(file, record.class_names, head)
        return cls(file, sha256_of_file(file), student, record, head)

    @property
    def extra(self) -> dict[str, np.ndarray]:
        """The graphs' inputs besides the image."""
        return {CLASS_VECTORS: self.head.class_vectors} if self.student.uses_candidates else {}

    @property
    def lines(self) -> list[str]:
        """The class names as classes.txt has them."""
        return class_list(self.record.class_names).splitlines()

    def origin(self, temperature: float, threshold: Mapping[str, Any]) -> Origin:
        """The metadata of its graphs. threshold: as in the manifest."""
        return Origin(
            student_sha256=self.sha256,
            recipe=self.record.recipe_name,
            class_names=self.lines,
            templates=self.record.prompts.templates,
            preprocessing=self.record.preprocessing,
            logit_scale=self.head.logit_scale,
            temperature=temperature,
            threshold=threshold,
        )

    def reference(self, part: Part, report: Report) -> Reference:
        """The student's output for images. Raises ExportError if it is not finite."""
        images = part.images
        report(Stage(f"Running the student in PyTorch on {part.size.words()}"))
        outputs = []
        with torch.inference_mode():
            for start in range(0, len(images), STUDENT_BATCH):
                outputs.append(self.student(torch.from_numpy(images[start : start + STUDENT_BATCH])))
                report(Progress("student", min(start + STUDENT_BATCH, len(images)), len(images)))
        features = torch.cat([output.features for output in outputs]).numpy()
        logits = torch.cat([output.logits for output in outputs]).numpy()
        if count := int((~np.isfinite(features).all(axis=1) | ~np.isfinite(logits).all(axis=1)).sum()):
            raise ExportError(
                f"its output for {count} of {len(images)} images is not finite",
                path=self.file,
                remedy="train the student again with a lower optim.learning_rate",
            )
        return Reference(images, features, logits, part.labels, part.different, self.head.matrix)
