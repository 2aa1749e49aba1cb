"""A frozen teacher that is ready to use: from a model's own weights, a released checkpoint, or a saved teacher.pt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from comkd_cli.data.prompts import Prompts
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import CheckpointError
from comkd_cli.events import Report, ignore_event
from comkd_cli.files import sha256_of_file
from comkd_cli.method import teacher as method
from comkd_cli.models.backbones import Clip, build_clip, build_image_tower, weights_sha256
from comkd_cli.models.checkpoints import SavedTeacher, load_teacher
from comkd_cli.models.weights import check_finite, differences_in_error, first_line
from comkd_cli.recipe.model import Model, Teacher
from comkd_cli.teachers.class_vectors import encode_prompts
from comkd_cli.teachers.prompted import Prompted, frozen_clip, released_prompted, saved_prompted


@dataclass(frozen=True)
class ReadyTeacher:
    """A frozen teacher with its pre-processing and the files that it came from."""

    teacher: method.Teacher
    preprocessing: Preprocessing
    checkpoint: Path | None
    """teacher.pt, for an adapted teacher."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of the files that it was loaded from, as `teacher_sha256` returns them."""


class TeacherSource(Protocol):
    """Prepares the teacher of a run when its student is about to be trained: flows/adapt's TeacherPreparation."""

    def prepare(self) -> ReadyTeacher:
        """The teacher, ready to use; training it can take hours."""
        ...


def build_teacher(
    settings: Teacher,
    class_names: Sequence[str],
    prompts: Prompts | str,
    device: torch.device,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """A teacher with its weights as they are, not adapted to any data.

    prompts: a CLIP gets their class vectors, as `encode_prompts` returns them. A released checkpoint has its own
    prompts, which replace them. Raises ModelError or CheckpointError.
    """
    sha256 = teacher_sha256(settings)
    if settings.format == "promptsrc":
        ready = teacher_of_prompted(released_prompted(settings, report), class_names, device, report=report)
    else:
        ready = teacher_of_clip(build_clip(settings, report=report), class_names, prompts, device, report)
    return replace(ready, sha256=sha256)


def load_saved_teacher(
    path: Path,
    class_names: Sequence[str],
    device: torch.device,
    key: str | None = None,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """The teacher of a teacher.pt, with the class vectors of these names.

    key: its expected `TeacherRecord.key`. Raises CheckpointError if it has another key, or if it was trained in
    full or probed on other classes, whose vectors it cannot compute; ModelError if the CLIP that it was adapted on
    could not be loaded.
    """
    saved = load_teacher(path)
    if key is not None and saved.record.key != key:
        raise CheckpointError(
            "was not trained with the settings and data that its folder's name stands for",
            path=path,
            remedy=f"delete {path.parent} to retrain it",
        )
    sha256 = {"teacher": sha256_of_file(path)}
    if saved.prompts is not None:
        ready = teacher_of_prompted(saved_prompted(saved, path), class_names, device, path, report)
        return replace(ready, sha256=sha256)
    if tuple(class_names) != saved.record.class_names:
        raise CheckpointError(
            "was trained on classes that differ from those of the data",
            path=path,
            found=f"{len(saved.record.class_names)} classes",
        )
    load = _load_probed if saved.is_frozen_clip else _load_full
    return ReadyTeacher(load(saved, path), saved.record.preprocessing, path, sha256)


def teacher_of_clip(
    clip: Clip,
    class_names: Sequence[str],
    prompts: Prompts | str,
    device: torch.device,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """A CLIP as a frozen teacher, with the class vectors of these names. prompts: as `build_teacher`.

    Raises ModelError.
    """
    clip.model.to(device)
    vectors = encode_prompts(clip, class_names, prompts, device, report)
    return _ready(clip, clip.model.visual, vectors, clip.model.logit_scale.detach().exp())  # type: ignore[arg-type,operator]


def teacher_of_prompted(
    prompted: Prompted,
    class_names: Sequence[str],
    device: torch.device,
    checkpoint: Path | None = None,
    report: Report = ignore_event,
) -> ReadyTeacher:
    """A prompted CLIP as a frozen teacher, with the class vectors of any class names. Raises ModelError."""
    module = prompted.module.to(device)
    with torch.no_grad():
        vectors = module.encode_classes(prompted.tokens(class_names, report).to(device))
    return _ready(prompted.clip, module.vision, vectors, module.logit_scale, checkpoint)


def _ready(
    clip: Clip, tower: nn.Module, vectors: Tensor, logit_scale: Tensor, checkpoint: Path | None = None
) -> ReadyTeacher:
    """A teacher with new class vectors. Raises ModelError if they are NaN or infinite."""
    computed = {"the class vectors": vectors, "the logit scale": logit_scale}
    check_finite(computed, checkpoint or clip.origin.weights or clip.origin.architecture)
    return ReadyTeacher(method.Teacher(tower, vectors, logit_scale), clip.preprocessing, checkpoint)


def _load_full(saved: SavedTeacher, path: Path) -> method.Teacher:
    """A teacher that was trained in full, with its own class vectors."""
    tower = build_image_tower(Model(**saved.record.model), load_weights=False)
    visual = {
        name.removeprefix("visual."): value for name, value in saved.state_dict.items() if name.startswith("visual.")
    }
    try:
        tower.module.load_state_dict(visual)
    except RuntimeError as error:
        raise CheckpointError(
            f"its weights do not fit {saved.record.origin.architecture}",
            path=path,
            found=differences_in_error(error) or first_line(error),
            remedy=f"delete {path.parent} to retrain it",
        ) from error
    return method.Teacher(tower.module, saved.class_vectors, saved.logit_scale)


def _load_probed(saved: SavedTeacher, path: Path) -> method.Teacher:
    """A teacher whose CLIP is frozen, with its fitted class vectors."""
    clip = frozen_clip(saved.record, path)
    return method.Teacher(clip.model.visual, saved.class_vectors, saved.logit_scale)  # type: ignore[arg-type]


def teacher_sha256(settings: Teacher, checkpoint: Path | None = None) -> dict[str, str]:
    """The sha256 of each local file that a teacher comes from, by the field of the recipe that names it.

    checkpoint: teacher.pt of an adapted teacher; the result is then only its digest, named `teacher`. open_clip's tags
    and the Hub's repositories have none.
    """
    if checkpoint is not None:
        return {"teacher": sha256_of_file(checkpoint)}
    base = Model(arch=settings.arch, config=settings.config, weights=settings.backbone_weights)
    digests = {
        "weights" if settings.weights is not None else "arch": weights_sha256(settings),
        "backbone_weights": weights_sha256(base) if settings.backbone_weights is not None else None,
    }
    return {name: digest for name, digest in digests.items() if digest is not None}
