"""A teacher ready to be asked: from a model's own weights, or from a saved teacher.pt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comkd_cli.backbones import Clip, build_clip, build_image_tower
from comkd_cli.checkpoints import SavedTeacher, load_teacher
from comkd_cli.errors import CheckpointError, DataError
from comkd_cli.method.teacher import Teacher, encode_classes
from comkd_cli.predictor import Preprocessing
from comkd_cli.recipe.model import Model

CLASSES_AT_ONCE = 256


@dataclass(frozen=True)
class ReadyTeacher:
    """A frozen teacher and what is known of it."""

    teacher: Teacher
    preprocessing: Preprocessing
    checkpoint: Path | None
    """teacher.pt, for an adapted teacher."""


def zero_shot_teacher(model: Model, prompts: Sequence[str], device: torch.device) -> ReadyTeacher:
    """A CLIP with its own weights, and the class vectors of these prompts. Raises ModelError."""
    return teacher_of_clip(build_clip(model), prompts, device)


def teacher_of_clip(clip: Clip, prompts: Sequence[str], device: torch.device) -> ReadyTeacher:
    """A CLIP that is at hand, as a teacher with the class vectors of these prompts."""
    clip.model.to(device)
    vectors = encode_prompts(clip, prompts, device)
    teacher = Teacher(clip.model.visual, vectors, clip.model.logit_scale.detach().exp())  # type: ignore[arg-type,operator]
    return ReadyTeacher(teacher, clip.preprocessing, None)


def saved_teacher(path: Path, key: str | None = None) -> ReadyTeacher:
    """The teacher of a teacher.pt, on the CPU. Raises CheckpointError, also where its key is not the given one."""
    saved = load_teacher(path)
    if key is not None and saved.record.key != key:
        raise CheckpointError(f"{path}: is another teacher than its folder says; remove {path.parent} to train it anew")
    return ReadyTeacher(_restored(saved, path), saved.record.preprocessing, path)


@torch.no_grad()
def encode_prompts(clip: Clip, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Class vectors (classes, dim) of prompts, L2-normalised, a part of them at a time."""
    tokens = tokenize_apart(clip, prompts).to(device)
    return torch.cat([encode_classes(clip.model, part) for part in torch.split(tokens, CLASSES_AT_ONCE)])


def tokenize_apart(clip: Clip, prompts: Sequence[str]) -> Tensor:
    """Token ids (prompts, context) of prompts that differ. Raises DataError where two become the same.

    open_clip cuts a prompt at the context's length without a word; classes that differ only beyond it could
    never be told apart.
    """
    tokens = clip.tokenize(list(prompts))
    first: dict[tuple[int, ...], str] = {}
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        if (other := first.setdefault(tuple(row), prompt)) != prompt:
            raise DataError(
                f"the prompts {other!r} and {prompt!r} are the same to {clip.origin.architecture} (it sees "
                f"{tokens.shape[1]} tokens); shorten `data.template` or the class names, or raise context_length"
            )
    return tokens


@torch.no_grad()
def encode_ensemble(clip: Clip, class_names: Sequence[str], templates: Sequence[str], device: torch.device) -> Tensor:
    """Class vectors (classes, dim) of a prompt ensemble: of each class the mean of its prompts' vectors,
    normalised again (openai/CLIP, Prompt_Engineering_for_ImageNet.ipynb).
    """
    vectors = []
    for name in class_names:
        tokens = clip.tokenize([template.replace("{}", name) for template in templates])
        vectors.append(encode_classes(clip.model, tokens.to(device)).mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def _restored(saved: SavedTeacher, path: Path) -> Teacher:
    tower = build_image_tower(Model(**saved.record.model), load_weights=False)
    visual = {
        name.removeprefix("visual."): value for name, value in saved.state_dict.items() if name.startswith("visual.")
    }
    try:
        tower.module.load_state_dict(visual)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit {saved.record.origin.architecture}") from error
    return Teacher(tower.module, saved.class_vectors, saved.logit_scale)
