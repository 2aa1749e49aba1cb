"""A run's training curve, and what its last epochs say about the next run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NAME = "metrics.jsonl"
SCORES = ("test_top1_percent", "test_agreement_percent")
"""Held-out figures of an epoch, the one to go by first."""
MOST_COUNT = 2**53  # above it an integer is not an exact float
NOISE_POINTS = 0.5  # how much a score varies if the number of its images is not recorded
IDLE_GATE = 0.01  # below this EduAttention adds less than a hundredth of a unit vector to a feature
STILL_FALLING = 0.02  # of the loss, over the last fifth of the epochs

Trend = Literal["rising", "level", "falling", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """How a curve ended."""

    trend: Trend
    """Of the held-out score in the last fifth of the epochs."""
    sentence: str
    """The same with its figures, and what to change."""


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The figures of each epoch of a run, from its folder; empty if there are none or they cannot be read."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
        epochs = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []
    return epochs if all(map(_is_epoch, epochs)) else []


def _is_epoch(epoch: object) -> bool:
    """Whether a line holds the number of an epoch, and numbers wherever figures are computed from it."""
    if not isinstance(epoch, dict) or not isinstance(epoch.get("epoch"), int):
        return False
    figures = [epoch[name] for name in ("epoch", "loss", "test_images", *SCORES) if epoch.get(name) is not None]
    return all(map(_is_number, figures)) and all(0 <= (epoch.get(name) or 0) <= 100 for name in SCORES)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST_COUNT)


def score_name(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The held-out figure that the epochs of a curve have, or None."""
    return next((name for name in SCORES if any(epoch.get(name) is not None for epoch in history)), None)


def judge(history: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether a run's held-out score was still rising in the last fifth of its epochs, and what to change.

    The best score of the last fifth is compared with the best one before it. A change counts if it is larger than
    the standard error of the score, sqrt(p (1 - p) / images).
    """
    name = score_name(history)
    last_fifth = math.ceil(len(history) * 0.8)  # epochs up to here came before it
    if name is None:
        return Verdict("unknown", f"No held-out score was measured during training{_loss_text(history)}.")
    scored = [(int(epoch["epoch"]), float(epoch[name]), epoch) for epoch in history if epoch.get(name) is not None]
    before = [value for number, value, _ in scored if number <= last_fifth]
    after = [value for number, value, _ in scored if number > last_fifth]
    if not before or not after:
        every = max(1, len(history) // 10)
        return Verdict(
            "unknown",
            "Too few epochs were scored to tell whether the run had converged; set evaluate_every_epochs to "
            f"{every} and train for 5 epochs or more.",
        )
    return _verdict(name, max(before), max(after), scored[-1][2], history)


def _verdict(
    name: str, before: float, after: float, last: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> Verdict:
    what = "test top-1" if name == "test_top1_percent" else "agreement with the teacher"
    epochs = len(history) - math.ceil(len(history) * 0.8)
    over = f"the last {epochs} of {len(history)} epochs" if epochs > 1 else f"the last of {len(history)} epochs"
    change, noise = after - before, _standard_error(after, last)
    figures = f"from {before:.2f} to {after:.2f} %, standard error {noise:.2f} points"
    if after + noise >= 100:
        return Verdict("level", f"The {what} reached its ceiling in {over} ({figures}): there is little left to gain.")
    if change > noise:
        return Verdict("rising", f"The {what} was still rising in {over} ({figures}): train for more epochs.")
    if change < -noise:
        return Verdict(
            "falling",
            f"The {what} fell in {over} ({figures}): the student fits its training images too closely; give it more "
            "images, or fewer epochs.",
        )
    fell = _loss_fell(history)
    if fell is None or fell > STILL_FALLING:
        told = "" if fell is None else f" while the training loss still fell by {fell:.0%}"
        return Verdict("level", f"The {what} was level in {over} ({figures}){told}: more images would help most.")
    return Verdict(
        "level",
        f"The {what} was level in {over} ({figures}), and so was the training loss: more epochs would change little; "
        "try a larger student.",
    )


def _standard_error(percent: float, epoch: Mapping[str, Any]) -> float:
    """Of a score, in points; from the number of its images if the epoch records it."""
    images = epoch.get("test_images")
    if not images or images < 0:
        return NOISE_POINTS
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / float(images))


def _loss_fell(history: Sequence[Mapping[str, Any]]) -> float | None:
    """By what share of itself the training loss fell over the last fifth of the epochs."""
    first, last = (history[i].get("loss") for i in (math.ceil(len(history) * 0.8) - 1, -1))
    return None if first is None or last is None or first <= 0 else float((first - last) / first)


def _loss_text(history: Sequence[Mapping[str, Any]]) -> str:
    if len(history) < 5 or (fell := _loss_fell(history)) is None:
        return ""
    how = f"still fell by {fell:.0%}" if fell > STILL_FALLING else "was level"
    return f"; the training loss {how} over the last fifth of the {len(history)} epochs"
