"""Which score distinguishes images of none of the classes from others.

    python -m benchmarks.rejection STUDENT.pt --negatives FOLDER [--negatives FOLDER] [--data-root DATA] [--images 1000]

Half of the student's labelled test images fit the temperature and, for each score, the threshold that accepts 95 %;
the other half are the images that should be accepted. Negatives are the images below each FOLDER and, without a folder,
256 generated textures. `left-out class`: each class in turn is removed from the classifier, and its images are
negatives; the mean over the classes. Prints one JSON document: for each kind of negatives and each score the AUROC, the
share of images that are accepted and the share of negatives that are accepted, in percent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score

from comkd_cli.bundles.calibration import fit_temperature
from comkd_cli.data.folder import images_below
from comkd_cli.data.source import ImageSet, evenly_spaced
from comkd_cli.data.sources import reopen_source
from comkd_cli.edge.images import prepare
from comkd_cli.models.checkpoints import load_student

BATCH, TEXTURES, SIDE, RANK = 64, 256, 64, 0.05


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--negatives", type=Path, action="append", default=[])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    student, record = load_student(options.student)
    scale = float(student.logit_scale)

    def logits_of(images: Sequence[Image.Image]) -> np.ndarray:
        prepared = np.stack([prepare(image, record.preprocessing) for image in images])
        with torch.inference_mode():
            parts = [student(batch).logits for batch in torch.from_numpy(prepared).split(BATCH)]
        return torch.cat(parts).double().numpy()

    test = reopen_source(record.recipe.data, record.holdout, options.data_root, Path("runs")).test
    assert test is not None, "the student has no test images"
    positions = np.random.default_rng(0).permutation(evenly_spaced(test, options.images))
    labels = np.asarray(test.labels)[positions]
    logits = logits_of([test.open(int(i)) for i in positions])
    half = len(logits) // 2
    temperature = fit_temperature(logits[:half], labels[:half]) or 1.0
    kinds = {str(folder): logits_of(opened(images_below(folder), options.images)) for folder in options.negatives}
    found = {
        "top1_percent": float(100 * (logits.argmax(axis=1) == labels).mean()),
        "temperature": temperature,
        "textures": compared(logits[half:], logits[:half], logits_of(textures()), temperature, scale),
        **{kind: compared(logits[half:], logits[:half], others, temperature, scale) for kind, others in kinds.items()},
        "left-out class": left_out(logits, labels, temperature, scale),
    }
    print(json.dumps(found, indent=2))


def scores(logits: np.ndarray, temperature: float, scale: float) -> dict[str, np.ndarray]:
    """By name, scores (images,) that are high for an image of a class."""
    ranked = np.sort(softmax(logits / temperature, axis=1), axis=1)
    return {
        "max_probability": ranked[:, -1],
        "margin": ranked[:, -1] - ranked[:, -2],
        "max_cosine": logits.max(axis=1) / scale,
        "energy": temperature * logsumexp(logits / temperature, axis=1),
    }


def compared(
    own: np.ndarray, fit: np.ndarray, others: np.ndarray, temperature: float, scale: float
) -> dict[str, dict[str, float]]:
    """The figures of each score. Logits (images, classes) to accept, of the fit, and of negatives."""
    positive, fitted, negative = (scores(logits, temperature, scale) for logits in (own, fit, others))
    figures = {}
    for name, values in positive.items():
        threshold = np.sort(fitted[name])[max(1, int(RANK * (len(fit) + 1))) - 1]
        truth = np.repeat([1, 0], [len(own), len(others)])
        figures[name] = {
            "auroc": float(roc_auc_score(truth, np.concatenate([values, negative[name]]))),
            "accepted_percent": float(100 * (values >= threshold).mean()),
            "negatives_accepted_percent": float(100 * (negative[name] >= threshold).mean()),
        }
    return figures


def left_out(
    logits: np.ndarray, labels: np.ndarray, temperature: float, scale: float
) -> dict[str, Mapping[str, float]]:
    """The mean figures of each score where a class is missing from the classifier."""
    is_fit = np.arange(len(logits)) < len(logits) // 2
    found = []
    for label in np.unique(labels):
        rest, known = np.delete(logits, label, axis=1), labels != label
        found.append(compared(rest[known & ~is_fit], rest[known & is_fit], rest[~known], temperature, scale))
    return {
        name: {figure: float(np.mean([one[name][figure] for one in found])) for figure in figures}
        for name, figures in found[0].items()
    }


def opened(images: ImageSet, most: int) -> list[Image.Image]:
    """Up to so many images of a set, evenly spaced."""
    return [images.open(i) for i in evenly_spaced(images, most)]


def textures() -> list[Image.Image]:
    """Gratings, checkerboards, blobs and noise in two random colours each."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    found = []
    for number in range(TEXTURES):
        angle, frequency, step = random.uniform(0, np.pi), random.uniform(0.1, 1.5), int(random.integers(2, 16))
        coarse = Image.fromarray(random.normal(size=(SIDE // step + 2, SIDE // step + 2)).astype(np.float32))
        pattern = (
            np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle))),
            ((x // step + y // step) % 2).astype(float),
            np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)),
            random.normal(size=(SIDE, SIDE)),
        )[number % 4]
        share = ((pattern - pattern.min()) / max(np.ptp(pattern), 1e-9))[..., None]
        first, second = random.uniform(0, 255, (2, 3))
        found.append(Image.fromarray((first * share + second * (1 - share)).astype(np.uint8)))
    return found


if __name__ == "__main__":
    main()
