"""How far a bundle's answers can be trusted: its temperature, and the threshold below which no class is the answer.

Needs only numpy; it becomes a part of every bundle's predict.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.edge.manifest import EXPORT_AGAIN, BundleProblem

SCORE = "max_probability"
"""What is compared with the threshold: the probability of the most probable class."""
NONE_OF_THESE = "none of these"


@dataclass(frozen=True)
class Confidence:
    """Turns logits into probabilities, and decides whether any class is the answer."""

    temperature: float = 1.0
    threshold: float | None = None
    """The least probability of an accepted answer, in [0, 1]; None accepts every answer."""
    by_class: Mapping[str, float] = field(default_factory=dict)
    """By the name of the answered class, thresholds that replace the common one."""
    applied: bool = True
    """Whether the threshold is applied."""

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """softmax(logits / temperature), float64 (batch, classes), of logits (batch, classes)."""
        return softmax(logits.astype(np.float64) / self.temperature)

    def threshold_of(self, class_name: str) -> float | None:
        """The threshold of an answer; None if every answer is accepted."""
        if self.threshold is None or not self.applied:
            return None
        return self.by_class.get(class_name, self.threshold)

    def is_none(self, class_name: str, probability: float) -> bool | None:
        """Whether the image shows none of the classes, by its most probable class and the probability of that.

        None if no threshold decides it.
        """
        threshold = self.threshold_of(class_name)
        return None if threshold is None else bool(probability < threshold)

    def accepted(self, probabilities: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
        """bool (batch,): the images whose answer reaches its threshold. probabilities: (batch, classes)."""
        answers = probabilities.argmax(axis=1)
        pairs = zip(answers, probabilities.max(axis=1), strict=True)
        return np.asarray([not self.is_none(class_names[answer], score) for answer, score in pairs], dtype=bool)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 (batch, classes) of logits (batch, classes)."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def read_confidence(folder: Path, manifest: Mapping[str, Any], applied: bool = True) -> Confidence:
    """The temperature and the threshold of a manifest; those of older bundles are 1 and none. Raises BundleProblem."""
    path = folder / "manifest.json"
    calibration, threshold = (_mapping(manifest.get(name), path, name) for name in ("calibration", "threshold"))
    temperature = calibration.get("temperature", 1.0)
    if not _is_finite_number(temperature) or temperature <= 0:
        raise _damaged(path, "calibration.temperature", temperature, "a positive number")
    value = threshold.get("value")
    if value is None:
        return Confidence(float(temperature))
    if threshold.get("score") != SCORE:
        raise _damaged(path, "threshold.score", threshold.get("score"), SCORE)
    by_class = _mapping(threshold.get("classes"), path, "threshold.classes")
    for name, limit in (("value", value), *((f"classes.{name}", limit) for name, limit in by_class.items())):
        if not _is_finite_number(limit) or not 0 <= limit <= 1:
            raise _damaged(path, f"threshold.{name}", limit, "a number from 0 to 1")
    return Confidence(
        float(temperature), float(value), {name: float(limit) for name, limit in by_class.items()}, applied
    )


def _mapping(value: Any, path: Path, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise _damaged(path, name, value, "an object, or null")
    return value or {}


def _is_finite_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _damaged(path: Path, name: str, found: object, allowed: str) -> BundleProblem:
    return BundleProblem("is not valid", path=path, field=name, found=repr(found), allowed=allowed, remedy=EXPORT_AGAIN)
