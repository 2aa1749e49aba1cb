"""The pairs of teacher and student that are studied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Fields = Mapping[str, Any]
"""Fields of a recipe, as plain data."""


@dataclass(frozen=True)
class Settings:
    """A pair of teacher and student, and the length of its training."""

    classes: int
    template: str
    augment: Fields
    teacher_config: Fields
    teacher_adapt: Fields
    students: Mapping[str, Fields]
    """open_clip configs by name; the first is that of every table but the one of sizes."""
    optim: Fields
    """Of every student, less its epochs."""
    epochs: int
    seeds: int
    fewer_seeds: int
    """Of the tables other than that of objectives."""
    image_counts: tuple[int, ...]
    """Of the table of unlabelled images; the last is taken for all that there are."""
    grid_images: int
    grid_epochs: int
    validation_share: float
    """Of the training images of each class: held out where weights are chosen."""
    trick_images: int
    trick_epochs: int
    """Of the table of tricks; each epoch has crops of its own."""
    long_epochs: int
    """Of the table of long training; each epoch has crops of its own."""
    longest_epochs: int
    """Of one more row of it, whose last epochs have the crops of the first again."""
    long_student: Fields = field(default_factory=dict)
    """Recipe fields of its students, by dotted names."""
    images: int | None = None
    """Training images of the table of objectives; None takes all."""
    pretrained_classes: int | None = None
    """None: the teacher is trained on every class, and the student from scratch. Else teacher and students are trained
    on the first classes, so many of them, and frozen; then prompts are trained in both."""
    prompts: Fields | None = None
    """Of a frozen student, as fields of `student.prompts`."""
    stage_1: Fields | None = None
    """How the frozen teacher is adapted, as fields of `teacher.adapt`."""

    @property
    def student(self) -> str:
        """The student of every table but the one of sizes."""
        return next(iter(self.students))


def _resnet(width: int) -> Fields:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": width, "head_width": 32}
    return {"embed_dim": 64, "vision_cfg": vision}


CIFAR10 = Settings(
    classes=10,
    template="a photo of a {}.",
    augment={"min_scale": 0.5},
    teacher_config={
        "embed_dim": 64,
        "vision_cfg": {"image_size": 48, "layers": [2, 2, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 2},
    },
    teacher_adapt={"method": "full", "epochs": 18, "batch_size": 128, "learning_rate": 3e-3},
    students={
        "efficientnet": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 32,
                "timm_model_name": "test_efficientnet",
                "timm_pool": "avg",
                "timm_proj": "none",
            },
        },
        "resnet_12": _resnet(12),
        "resnet_8": _resnet(8),
        "resnet_4": _resnet(4),
        "resnet_2": _resnet(2),
    },
    optim={"name": "adamw", "batch_size": 128, "learning_rate": 4e-3},
    epochs=8,
    seeds=5,
    fewer_seeds=3,
    image_counts=(1_000, 5_000, 10_000, 50_000),
    grid_images=10_000,
    grid_epochs=6,
    validation_share=0.1,
    trick_images=5_000,
    trick_epochs=40,
    long_epochs=24,
    longest_epochs=48,
    # The student has five strides: of 32 pixels one position remains, of 64 four.
    long_student={"student.config.vision_cfg.image_size": 64},
)


def _transformers(image: Fields, embed_dim: int = 64) -> Fields:
    text = {"context_length": 24, "width": 64, "heads": 2, "layers": 2}  # holds the longest of PromptSRC's templates
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": 32, "patch_size": 4, **image}, "text_cfg": text}


TRANSFORMERS = replace(
    CIFAR10,
    teacher_config=_transformers({"width": 96, "layers": 4, "head_width": 32}),
    teacher_adapt={"method": "full", "epochs": 20, "batch_size": 128, "learning_rate": 1e-3},
    students={"vit_64": _transformers({"width": 64, "layers": 3, "head_width": 32})},
    # PromptKD's 0.005 for a batch of 8, scaled to the batch.
    optim={"name": "sgd", "batch_size": 32, "learning_rate": 0.02},
    epochs=10,
    seeds=3,
    grid_images=5_000,
    grid_epochs=4,
    images=5_000,
    pretrained_classes=7,
    prompts={"depth": 3},
    stage_1={"method": "promptsrc", "shots": 16, "epochs": 20, "vision_depth": 3, "text_depth": 2},
)
"""The paper's own regime at small size: both towers are transformers, frozen, and prompts alone are trained."""

LARGER_TEACHER = replace(
    CIFAR10,
    teacher_config={
        **CIFAR10.teacher_config,
        "vision_cfg": {**CIFAR10.teacher_config["vision_cfg"], "width": 20},
    },
)
"""The students of the first pair have at most a sixteenth of this teacher's image tower."""

PAIRS = {"convnets": CIFAR10, "transformers": TRANSFORMERS, "larger_teacher": LARGER_TEACHER}
