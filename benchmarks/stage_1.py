"""The gain of a zero-shot teacher from 16 labelled images per class: PromptSRC on digits.

    python -m benchmarks.stage_1 [--known 7] [--seeds 1 2 3] [--epochs 20] [--learning-rate 0.005]

A small CLIP of two transformers is first trained on the digits 0 to known - 1 of scikit-learn's training images.
Frozen, it is then scored on the test images of all ten digits, zero-shot and after stage 1 with 16 images of each
digit. Prints one JSON document: top-1 in percent, on all test images and on those of the unseen digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.data.digits import digits_source
from comkd_cli.data.loaders import scoring_batches
from comkd_cli.data.source import Source
from comkd_cli.data.sources import open_source
from comkd_cli.evaluation.metrics import top1_percent
from comkd_cli.events import Epoch, Event
from comkd_cli.flows import adapt
from comkd_cli.models.checkpoints import load_teacher
from comkd_cli.recipe import parse_recipe
from comkd_cli.teachers.loading import ReadyTeacher
from comkd_cli.training.accelerator import make_accelerator

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 4},
}
TEMPLATE = "a photo of a {}."


def teacher_of(teacher: dict[str, Any], data: dict[str, Any], runs: Path) -> tuple[ReadyTeacher, adapt.Stage1]:
    """Stage 1 of a recipe, run or reused."""
    recipe = parse_recipe(
        {
            "data": data,
            "augment": {"min_scale": 0.6, "flip": False},
            "teacher": {"config": CONFIG, **teacher},
            "student": {"config": CONFIG, "train": "full"},
            "evaluate_every_epochs": 10,
        }
    )
    source = open_source(recipe.data, runs)
    stage = adapt.stage_1(recipe, source, runs, runs / "runs")
    return adapt.TeacherPreparation(stage, make_accelerator("fp32"), tell, "").prepare(), stage


def tell(event: Event) -> None:
    """Print epochs to standard error."""
    if isinstance(event, Epoch) and event.number % 10 == 0:
        print(f"epoch {event.number}/{event.total} {event.figures}", file=sys.stderr)


def score(ready: ReadyTeacher, source: Source, known: int) -> dict[str, float]:
    """Top-1 in percent over all classes, of all test images and of those of the unseen classes."""
    assert source.test is not None
    answers = [
        ready.teacher(batch.inputs[0]).logits.argmax(dim=1)
        for batch in scoring_batches(source.test, ready.preprocessing, 64, 0)
    ]
    predicted, labels = torch.cat(answers).numpy(), np.asarray(source.test.labels)
    unseen = labels >= known
    return {"all": top1_percent(predicted, labels), "unseen": top1_percent(predicted[unseen], labels[unseen])}


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--pretrain-epochs", type=int, default=60)
    options = parser.parse_args()
    digits = digits_source(TEMPLATE)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save_known(digits, options.known, root / "known")
        full = {"method": "full", "epochs": options.pretrain_epochs, "batch_size": 64, "learning_rate": 1e-3}
        _, stage = teacher_of({"adapt": full}, {"folder": str(root / "known"), "template": TEMPLATE}, root)
        weights = root / "clip.pt"
        torch.save(load_teacher(stage.file).state_dict, weights)
        data = {"dataset": "digits", "template": TEMPLATE}
        plain, _ = teacher_of({"weights": str(weights)}, data, root)
        adapted = []
        for seed in options.seeds:
            prompts = {
                "method": "promptsrc",
                "seed": seed,
                "epochs": options.epochs,
                "learning_rate": options.learning_rate,
                "vision_depth": 4,
                "text_depth": 4,
            }
            ready, _ = teacher_of({"weights": str(weights), "adapt": prompts}, data, root)
            adapted.append(score(ready, digits, options.known))
        document = {
            "known_classes": options.known,
            "learning_rate": options.learning_rate,
            "zero_shot_top1_percent": score(plain, digits, options.known),
            "adapted_top1_percent": adapted,
            "adapted_mean_percent": statistics.mean(found["all"] for found in adapted),
        }
    print(json.dumps(document, indent=2))


def save_known(digits: Source, known: int, folder: Path) -> None:
    """Write the training images of the first classes, one folder per class."""
    for index, label in enumerate(digits.train.labels or ()):
        if label < known:
            path = folder / "train" / digits.class_names[label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digits.train.open(index).save(path)


if __name__ == "__main__":
    main()
