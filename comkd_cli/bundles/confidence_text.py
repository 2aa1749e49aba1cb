"""Sentences on the temperature and the threshold of a manifest. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from comkd_cli.bundles.parts import PartSize


def confidence_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A sentence or two on the temperature, then on the threshold; empty for bundles of older versions."""
    if "calibration" not in manifest or "threshold" not in manifest:
        return []
    return [" ".join(_temperature(manifest)), " ".join(_threshold(manifest))]


def _temperature(manifest: Mapping[str, Any]) -> Iterator[str]:
    calibration = manifest["calibration"]
    if calibration["fitted_to"] is None:
        yield f"Probabilities are softmax(logits); no temperature was fitted: {calibration['reason']}."
    else:
        targets = "labels of" if calibration["fitted_to"] == "labels" else "teacher's answers to"
        images = PartSize(**{**manifest["images"]["fit"], "images": calibration["images"]}).words()
        yield (
            f"Probabilities are softmax(logits / {calibration['temperature']:g}); the temperature was fitted to the "
            f"{targets} {images}."
        )
    if calibration["error_of"] is None:
        return
    of = "" if calibration["error_of"] == "labels" else ", where agreement with the teacher counts as right"
    before, after = calibration["error_before_percent"], calibration["error_after_percent"]
    at_one = "" if calibration["fitted_to"] is None else f", {before:.1f} % without the temperature"
    yield (
        f"Their expected calibration error is {after:.1f} % on {calibration['error_images']} images of the gate"
        f"{of}{at_one}."
    )


def _threshold(manifest: Mapping[str, Any]) -> Iterator[str]:
    threshold = manifest["threshold"]
    if threshold["value"] is None:
        yield f"Every image is assigned one of the classes, because no threshold was fitted: {threshold['reason']}."
        return
    own = len(threshold["classes"])
    classes = f" ({own} {'class has its own threshold' if own == 1 else 'classes have their own thresholds'})" * bool(
        own
    )
    yield (
        f"An image whose largest probability is below {threshold['value']:g}{classes} is classified as 'none of "
        f"these'; {threshold['accept_percent']:g} % of images like the {threshold['images']} of the fit are accepted."
    )
    accepted = []
    for precision, entry in manifest["precisions"].items():
        figures = entry.get("confidence")
        if figures is not None and figures["accepted_percent"] is not None:
            low, high = figures["accepted_interval_percent"]
            share = f"{figures['accepted_percent']:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"
            accepted.append(f"{precision} accepts {share}")
    if accepted:
        yield f"Of the gate's images, {', '.join(accepted)}."
    negatives = threshold["negatives"]
    if negatives is not None:
        low, high = negatives["false_acceptance_interval_percent"]
        yield (
            f"Of {negatives['images']} images that show none of the classes, "
            f"{negatives['false_acceptance_percent']:.1f} % are wrongly accepted "
            f"(95 % interval {low:.1f} to {high:.1f} %); AUROC {negatives['auroc']:.3f}."
        )
    else:
        yield "It was not measured on images that show none of the classes."
    if manifest["classes_added"]:
        yield "It was fitted without images of the classes that were added."
