"""A distillation small enough to run in a test: seconds, on real digits."""

from typing import Any

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 10, "width": 16, "heads": 2, "layers": 1},
}
TOWER = {"embed_dim": 12, "vision_cfg": {**CLIP["vision_cfg"], "width": 16, "layers": 1}}  # type: ignore[dict-item]
OPTIM = {"name": "adamw", "epochs": 2, "batch_size": 128, "learning_rate": 0.003}


def recipe(**changes: Any) -> dict[str, Any]:
    """The recipe as plain data, with top-level fields changed."""
    fields = {
        "data": {"dataset": "digits"},
        "augment": {"min_scale": 0.7, "flip": False},
        "teacher": {"config": CLIP, "adapt": {"method": "full", "epochs": 2, "batch_size": 128}},
        "student": {"train": "full", "config": TOWER},
        "loss": {"refinement": {"weight": 10.0}, "if_align": {"weight": 0.01}},
        "optim": OPTIM,
        "evaluate_every_epochs": 1,
    }
    return {**fields, **changes}
