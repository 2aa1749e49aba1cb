"""Accuracy of students from copies of decoded images beside students from the images (`data.resized`).

    python -m benchmarks.copies_accuracy CIFAR_FOLDER OUT [--images 2000] [--test 1000] [--seeds 3] [--epochs 8]

CIFAR_FOLDER holds train/<class>/ and test/<class>/ of CIFAR-10. Its first images of each class are enlarged to
500 x 500 pixels, with noise of one pixel added so that they have detail that copies lose, and written as JPEG files to
OUT/images. For each seed the recipe `cifar10` trains a teacher and a student on them twice, from the images
(`data.resized: off`) and from copies (`auto`: 102 pixels, for an input of 64), by `comkd distill` itself; finished runs
are not repeated, so that the command can be interrupted. Prints one JSON document: top-1 of each student on the test
images, means, standard deviations over the seeds, and the difference of the means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from comkd_cli.data.image_files import find_images, subfolders_of
from comkd_cli.models.checkpoints import load_student_record

SIDE = 500
NOISE = 8.0  # standard deviation, in levels
QUALITY = 92
KINDS = ("off", "auto")


def main() -> None:
    """Make the images, train, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    for split, count in (("train", options.images), ("test", options.test)):
        enlarge(options.folder / split, options.out / "images" / split, count)
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in range(1, options.seeds + 1):
        for kind in KINDS:
            scores[kind].append(top_1(options.out, kind, seed, options.epochs))
    means = {kind: statistics.mean(found) for kind, found in scores.items()}
    document = {
        "top_1": scores,
        "mean": means,
        "standard_deviation": {
            kind: statistics.stdev(found) if len(found) > 1 else None for kind, found in scores.items()
        },
        "auto_minus_off": means["auto"] - means["off"],
        "images": options.images,
        "test_images": options.test,
        "epochs": options.epochs,
    }
    print(json.dumps(document, indent=2))


def enlarge(source: Path, target: Path, count: int) -> None:
    """Write the first images of each class in 500 x 500 pixels, `count` in all, unless they exist."""
    classes = subfolders_of(source)
    for name in classes:
        (target / name).mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(list(find_images(source / name))[: count // len(classes)]):
            file = target / name / f"{path.stem}.jpg"
            if file.exists():
                continue
            with Image.open(path) as image:
                large = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            noise = np.random.default_rng([number, classes.index(name)]).normal(0, NOISE, (SIDE, SIDE, 1))
            levels = (np.asarray(large) + noise).clip(0, 255).astype(np.uint8)
            unfinished = file.with_suffix(".part")
            Image.fromarray(levels).save(unfinished, "JPEG", quality=QUALITY)
            unfinished.replace(file)


def top_1(out: Path, kind: str, seed: int, epochs: int) -> float:
    """Of the student of a seed, in percent, trained now unless it is finished."""
    settings = {
        "data.folder": out / "images",
        "data.resized": kind,
        "teacher.adapt.epochs": epochs,
        "teacher.adapt.seed": seed,
        "optim.epochs": epochs,
        "optim.batch_size": 64,
        "teacher.adapt.batch_size": 64,
        "evaluate_every_epochs": 0,
    }
    runs = out / "runs" / kind
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "comkd_cli", "distill", "cifar10", "--runs", str(runs), "--seed", str(seed)]
    subprocess.run([*command, *changes], check=True, stdout=sys.stderr)
    return load_student_record(runs / "cifar10" / "images" / f"seed{seed}" / "student.pt").metrics["test_top1_percent"]


if __name__ == "__main__":
    main()
