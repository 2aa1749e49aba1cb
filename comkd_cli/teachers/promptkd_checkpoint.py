"""Students as PromptKD's code saves them, read without running anything from the file.

Its wrapper holds CLIP's image encoder with its prompts, a projector of 1 x 1 convolutions named VPT_image_trans (on
features that is Linear, BatchNorm, ReLU, Linear) and CLIP's logit scale. The class vectors are the teacher's, so the
file has no text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from comkd_cli.errors import CheckpointError
from comkd_cli.models.weights import check_finite
from comkd_cli.teachers.promptsrc_checkpoint import IMAGE_ENCODER, PROJECTOR, as_float, read_state, vision_prompts

CONVOLUTIONS = f"{PROJECTOR}conv1."
LOGIT_SCALE = "logit_scale"


@dataclass(frozen=True)
class ReleasedStudent:
    """A distilled student, as its file stores it."""

    tower_state: dict[str, Tensor]
    """The image encoder's own weights, float32, under open_clip's names."""
    vision_tokens: Tensor
    """(depth, tokens, width); (1, 0, width) for a file without prompts."""
    projector_state: dict[str, Tensor]
    """Under the names of method/projector.py with two layers: `0.weight` is (dim, width), `3.weight` (dim, dim)."""
    log_scale: Tensor
    """Scalar: the logit scale is its exp."""


def read_released_student(path: Path) -> ReleasedStudent:
    """The student of a PromptKD checkpoint. Raises CheckpointError, naming the file and what it lacks."""
    state = as_float(read_state(path), path)
    if not any(name.startswith(PROJECTOR) for name in state):
        raise CheckpointError(f"is not a student of PromptKD: it has no {PROJECTOR.rstrip('.')}", path=path)
    check_finite(state, path, CheckpointError)
    vision = vision_prompts(state, path)
    projector = {
        name.removeprefix(CONVOLUTIONS): _as_linear(value)
        for name, value in state.items()
        if name.startswith(CONVOLUTIONS)
    }
    if LOGIT_SCALE not in state:
        raise CheckpointError(f"is not a student of PromptKD: it has no {LOGIT_SCALE}", path=path)
    tower = {name.removeprefix(IMAGE_ENCODER): value for name, value in state.items() if name.startswith(IMAGE_ENCODER)}
    return ReleasedStudent(tower, vision, projector, state[LOGIT_SCALE].reshape(()))


def _as_linear(weight: Tensor) -> Tensor:
    """The weight of a 1 x 1 convolution as that of a Linear; any other tensor as it is."""
    return weight[:, :, 0, 0] if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight
