"""A distillation small enough to run in a test: a second, on real digits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from comkd_cli.models.backbones import ImageTower
    from comkd_cli.models.checkpoints import StudentRecord
    from comkd_cli.recipe import Recipe

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 10, "width": 16, "heads": 2, "layers": 1},
}
TOWER = {"embed_dim": 12, "vision_cfg": {**CLIP["vision_cfg"], "width": 16, "layers": 1}}  # type: ignore[dict-item]
OPTIM = {"name": "adamw", "epochs": 2, "batch_size": 32, "learning_rate": 0.003}
DIGITS, TRAIN, TEST = 420, 336, 84  # images of few_digits: all, to train on, to test on


def recipe(**changes: Any) -> dict[str, Any]:
    """The recipe as plain data, with top-level fields changed."""
    fields = {
        "data": {"dataset": "digits"},
        "augment": {"min_scale": 0.7, "flip": False},
        "teacher": {"config": CLIP, "adapt": {"method": "full", "epochs": 2, "batch_size": 32}},
        "student": {"train": "full", "config": TOWER},
        "loss": {"refinement": {"weight": 10.0}, "if_align": {"weight": 0.01}, "edu_attention": {}},
        "optim": OPTIM,
        "evaluate_every_epochs": 1,
    }
    return {**fields, **changes}


def student_record(recipe: "Recipe", tower: "ImageTower", **fields: Any) -> "StudentRecord":
    """The record of a student of three animals that was not trained, with fields changed."""
    from comkd_cli.models.checkpoints import StudentRecord

    plain: dict[str, Any] = {
        "recipe_name": "tiny",
        "source": "animals",
        "class_names": ("cat", "dog", "fox"),
        "template": "a {}",
        "backbone_sha256": None,
        "teacher": None,
        "identity": "1",
        "metrics": {},
    }
    return StudentRecord(recipe=recipe, preprocessing=tower.preprocessing, backbone=tower.origin, **{**plain, **fields})


def digits_folder(root: Path, train: int, test: int) -> Path:
    """The first digits as files, in train/ and test/ with a sub-folder for each class."""
    from comkd_cli.data.digits import digits_source

    source = digits_source()
    for split, images, count in (("train", source.train, train), ("test", source.test, test)):
        assert images is not None
        assert images.labels is not None
        for name in source.class_names:
            (root / split / name).mkdir(parents=True)
        for index in range(count):
            images.open(index).save(root / split / str(images.labels[index]) / f"{index:03}.png")
    return root


def few_digits(patch: pytest.MonkeyPatch, count: int = DIGITS) -> None:
    """Let the dataset `digits` have its first images alone, so that an epoch takes a fraction of a second."""
    from comkd_cli.data import digits

    images, targets = digits._scans()
    first = images[:count], targets[:count]
    patch.setattr(digits, "_scans", lambda: first)
