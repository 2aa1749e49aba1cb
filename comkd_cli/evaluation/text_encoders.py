"""How close the vectors of one text encoder are to those of another, name by name and on images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comkd_cli.evaluation.metrics import agreement_percent, top1_percent
from comkd_cli.recipe.data import UNLABELLED


def cosine_rows(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The cosine of each pair of rows, float64 (rows,); -1 if it is not finite. Both (rows, dim)."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosines = np.sum(found.astype(np.float64) * expected, axis=1) / norms
    return np.where(np.isfinite(cosines), cosines, -1.0)


def name_figures(found: np.ndarray, expected: np.ndarray, constant: np.ndarray) -> dict[str, float]:
    """Vectors of names by two encoders, both (names, dim) and L2-normalised.

    `retrieval_percent`: the names whose found vector is nearest to the expected vector of the same name among all.
    `constant_cosine_mean`: of a constant vector, (dim,), with the expected ones: what ignoring the name would reach.
    """
    cosines = cosine_rows(found, expected)
    nearest = (found @ expected.T).argmax(axis=1)
    constants = cosine_rows(np.broadcast_to(constant, expected.shape), expected)
    return {
        "held_out_names": float(len(expected)),
        "held_out_cosine_mean": float(cosines.mean()),
        "held_out_cosine_min": float(cosines.min()),
        "held_out_retrieval_percent": agreement_percent(nearest, np.arange(len(expected))),
        "constant_cosine_mean": float(constants.mean()),
    }


def least_agreement_percent(features: np.ndarray, expected: np.ndarray, found: np.ndarray) -> float:
    """The least top-1 agreement of class vectors `found` with `expected`, in percent, on features (images, dim).

    All classes have their found vector, or every second one, as on a device that adds classes to exact ones: an error
    that all found vectors share cancels in the first case and not in the second. expected, found: (classes, dim).
    """
    exact = (features @ expected.T).argmax(axis=1)
    every_second = np.arange(len(expected))[:, None] % 2
    mixed = [np.where(every_second == side, found, expected) for side in (0, 1)]
    with np.errstate(invalid="ignore"):  # of vectors that are not finite, whose cosine is reported
        answers = [(features @ vectors.T).argmax(axis=1) for vectors in (found, *mixed)]
    return min(agreement_percent(predicted, exact) for predicted in answers)


def image_figures(
    features: np.ndarray, labels: np.ndarray | None, expected: np.ndarray, found: np.ndarray, new: Sequence[int]
) -> dict[str, float]:
    """Zero-shot classification of images with the class vectors of two encoders, both (classes, dim).

    features: (images, dim). labels: (images,), UNLABELLED if there is none, or None. new: the classes that the
    encoder of `found` was not trained on; if there are some, `new_class` figures are of a classifier in which they
    alone have found vectors, as on a device that adds them.
    """
    exact = (features @ expected.T).argmax(axis=1)
    predicted = {"image": (features @ found.T).argmax(axis=1)}
    if new:
        mixed = expected.copy()
        mixed[list(new)] = found[list(new)]
        predicted["new_class"] = (features @ mixed.T).argmax(axis=1)
    labelled = np.zeros(len(features), dtype=bool) if labels is None else labels != UNLABELLED
    figures = {"images": float(len(features))}
    for name, answers in predicted.items():
        figures[f"{name}_agreement_percent"] = agreement_percent(answers, exact)
    if labels is not None and labelled.any():
        of_all = {**predicted, "teacher_vectors": exact}
        for name, answers in of_all.items():
            figures[f"{name}_top1_percent"] = top1_percent(answers[labelled], labels[labelled])
    return figures
