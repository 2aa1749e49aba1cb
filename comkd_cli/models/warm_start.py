"""A new student that starts from the weights of a finished one: `student.weights: RUN/student.pt`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from comkd_cli.errors import CheckpointError, ModelError
from comkd_cli.events import Notice, Report
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import ImageTower, build_image_tower, state_sha256
from comkd_cli.models.checkpoints import StudentRecord, is_student, load_student_state
from comkd_cli.recipe import model as recipe


@dataclass(frozen=True)
class WarmStart:
    """A finished student whose weights a new one of the same architecture starts from."""

    path: Path
    record: StudentRecord
    state: Mapping[str, Tensor]
    """Its learned tensors."""

    @classmethod
    def of(cls, settings: recipe.Student) -> WarmStart | None:
        """The student that `student.weights` names; None if it names other weights.

        Raises CheckpointError for a damaged student, and ModelError for one of another architecture, or one that is
        trained otherwise: a prompts-only student.pt lacks the backbone, which `train: full` would start from.
        """
        path = Path(settings.weights).expanduser() if settings.weights else None
        if path is None or not is_student(path):
            return None
        record, state = load_student_state(path)
        then = record.recipe.student
        for field in ("arch", "config", "train"):
            found, needed = getattr(then, field), getattr(settings, field)
            if found != needed:
                raise ModelError(
                    f"differs from that of the student in student.weights ({path})",
                    field=f"student.{field}",
                    found=needed,
                    allowed=str(found),
                    remedy="use the same value, or remove student.weights",
                )
        return cls(path, record, state)

    def build_tower(self, settings: recipe.Student, seed: int, report: Report) -> ImageTower:
        """The image tower of the new student; `load_into` loads what was learned.

        Only a prompts-only student needs the original weights of its backbone, which its file does not hold. Raises
        CheckpointError if these have changed since, and ModelError.
        """
        frozen = settings.train == "prompts"
        initial = settings.model_copy(update={"weights": self.record.backbone.weights})
        tower = build_image_tower(initial, seed, load_weights=frozen, report=report)
        if frozen and (found := state_sha256(tower.module)) != self.record.backbone_sha256:
            raise CheckpointError(
                f"its prompts were not trained on the current weights of {initial.weights or initial.arch}, but on "
                f"different ones (sha256 of their tensors: {self.record.backbone_sha256})",
                path=self.path,
                found=found,
                remedy="restore the weights that it was trained with",
            )
        return replace(tower, origin=self.record.backbone)

    def load_into(self, student: Student, report: Report) -> None:
        """Load each tensor that has the same name and shape in the new student; a notice names the others."""
        own = {name: value.shape for name, value in student.learned_state().items()}
        matching = {name: value for name, value in self.state.items() if own.get(name) == value.shape}
        student.load_state_dict(matching, strict=False)
        text = f"student.weights: {len(matching)} of {len(own)} tensors start from {self.path}"
        if scratch := _counted(name for name in own if name not in matching):
            text += f"; no tensor of the same name and shape for {scratch}, which starts from scratch"
        if unused := _counted(name for name in self.state if name not in own):
            text += f"; the file also has {unused}, unused"
        report(Notice(text))


def _counted(names: Iterable[str]) -> str:
    """Tensors by the part of a student that they belong to: `4 of projector, 7 of edu_attention`."""
    parts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{count} of {part}" for part, count in parts.items())
