"""What is fitted, to what, and what the manifest says where nothing is: with logits that are made, and no model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from comkd_cli.bundles.calibration import calibration_error_percent, fit_temperature, fit_threshold
from comkd_cli.bundles.confidence import TEACHER_IMAGES, Answered, ConfidenceFitter, FittedConfidence, top1_of
from comkd_cli.bundles.confidence_text import confidence_lines
from comkd_cli.bundles.parts import Part
from comkd_cli.edge.threshold import Confidence
from comkd_cli.errors import CheckpointError
from comkd_cli.events import Event, Notice

CLASSES = ["a", "b", "c", "d"]


def answered(seed: int, images: int = 300, labelled: bool = True) -> Answered:
    """Logits of a student whose probabilities hold at T = 2, and labels drawn from them."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, (images, 4)).astype(np.float32)
    shares = softmax(logits / 2, axis=1).cumsum(axis=1)
    labels = (random.random((images, 1)) < shares).argmax(axis=1) if labelled else None
    pixels = np.full((images, 1, 1, 1), seed, np.float32)
    return Answered(Part(pixels, "test" if labelled else "given", labels, images), logits)


class FakeTeacher:
    """Answers from the student's logits at T = 3, by the part's seed; or fails."""

    def __init__(self, parts: list[Answered], error: Exception | None = None) -> None:
        self._logits = {float(found.part.images[0, 0, 0, 0]): found.logits for found in parts}
        self._error = error

    def probabilities(self, part: Part) -> np.ndarray:
        if self._error is not None:
            raise self._error
        return np.asarray(softmax(self._logits[float(part.images[0, 0, 0, 0])][:TEACHER_IMAGES] / 3, axis=1))


def fit(
    gate: Answered, unseen: Answered | None, accept: float = 95, error: Exception | None = None, **options: Any
) -> tuple[FittedConfidence, list[str]]:
    events: list[Event] = []
    teacher: Any = FakeTeacher([gate, *([] if unseen is None else [unseen])], error)
    fitter = ConfidenceFitter(CLASSES, accept, teacher, events.append)
    fitted = fitter.fit(gate, unseen, options.get("no_fit"))
    return fitted, [event.text for event in events if isinstance(event, Notice)]


def test_labels_are_fitted_to_and_the_error_is_of_the_gate() -> None:
    gate, unseen = answered(1), answered(2)
    fitted, notices = fit(gate, unseen)
    assert unseen.part.labels is not None
    assert gate.part.labels is not None
    temperature = fit_temperature(unseen.logits, unseen.part.labels)
    assert fitted.confidence.temperature == temperature == pytest.approx(2, rel=0.2)
    assert fitted.calibration == {
        "temperature": temperature,
        "fitted_to": "labels",
        "images": 300,
        "reason": None,
        "error_of": "labels",
        "error_images": 300,
        "error_before_percent": pytest.approx(
            calibration_error_percent(softmax(gate.logits.astype(float), axis=1), gate.part.labels)
        ),
        "error_after_percent": pytest.approx(
            calibration_error_percent(softmax(gate.logits.astype(float) / temperature, axis=1), gate.part.labels)
        ),
    }
    assert fitted.calibration["error_after_percent"] < fitted.calibration["error_before_percent"]
    scores = softmax(unseen.logits.astype(float) / temperature, axis=1).max(axis=1)
    assert fitted.threshold["value"] == fitted.confidence.threshold == fit_threshold(scores, 95)
    assert (fitted.threshold["score"], fitted.threshold["images"]) == ("max_probability", 300)
    assert notices == []


def test_the_gate_accepts_about_the_share_of_the_fit() -> None:
    gate = answered(1, 2000)
    fitted, _ = fit(gate, answered(2, 500), accept=80)
    figures = fitted.figures(gate.logits)
    assert figures["accepted_percent"] == pytest.approx(80, abs=5)
    low, high = figures["accepted_interval_percent"]
    assert low < figures["accepted_percent"] < high
    assert figures["calibration_error_percent"] == fitted.calibration["error_after_percent"]


def test_without_labels_the_teachers_answers_are_fitted_to_and_agreement_is_measured() -> None:
    gate, unseen = answered(1, labelled=False), answered(2, labelled=False)
    fitted, _ = fit(gate, unseen)
    assert fitted.confidence.temperature == 3
    assert (fitted.calibration["fitted_to"], fitted.calibration["images"]) == ("teacher", TEACHER_IMAGES)
    assert (fitted.calibration["error_of"], fitted.calibration["error_images"]) == ("teacher", TEACHER_IMAGES)
    # The teacher's answers are the student's: it is right each time, and not sure of it.
    sure = softmax(gate.logits[:TEACHER_IMAGES] / 3, axis=1).max(axis=1).mean()
    assert fitted.calibration["error_after_percent"] == pytest.approx(100 * (1 - sure), rel=1e-3)
    assert fitted.threshold["images"] == 300


def test_without_labels_and_teacher_the_threshold_alone_is_fitted() -> None:
    gate, unseen = answered(1, labelled=False), answered(2, labelled=False)
    fitted, notices = fit(gate, unseen, error=CheckpointError("no such file", path="teacher.pt"))
    assert (fitted.confidence.temperature, fitted.calibration["fitted_to"]) == (1.0, None)
    assert "teacher.pt: no such file" in fitted.calibration["reason"]
    assert fitted.calibration["error_of"] is fitted.calibration["error_after_percent"] is None
    assert fitted.threshold["value"] is not None
    assert len(notices) == 1
    assert notices[0].startswith("no temperature is fitted: ")


def test_without_unseen_images_nothing_is_fitted() -> None:
    fitted, notices = fit(answered(1), None, no_fit="only training images")
    assert fitted.confidence == Confidence()
    assert fitted.calibration["reason"] == fitted.threshold["reason"] == "only training images"
    assert fitted.figures(answered(1).logits) == dict.fromkeys(
        ("calibration_error_percent", "accepted_percent", "accepted_interval_percent")
    )
    assert [text.split(" is fitted: ")[0] for text in notices] == ["no temperature", "no threshold"]


def test_a_share_that_takes_more_images_than_there_are_gives_no_threshold() -> None:
    fitted, _ = fit(answered(1), answered(2, images=60), accept=99)
    assert fitted.confidence.threshold is None
    assert "at least 99 unseen images" in fitted.threshold["reason"]
    assert fitted.calibration["fitted_to"] == "labels"


def test_labels_that_are_all_right_determine_no_temperature() -> None:
    unseen = answered(2)
    right = replace(unseen, part=replace(unseen.part, labels=unseen.logits.argmax(axis=1)))
    fitted, _ = fit(answered(1), right)
    assert fitted.confidence.temperature == 1
    assert "cannot be determined from 300 images" in fitted.calibration["reason"]


def test_negatives_are_measured_and_change_nothing() -> None:
    fitted, _ = fit(answered(1), answered(2))
    flat = np.random.default_rng(3).normal(0, 0.5, (80, 4)).astype(np.float32)  # of which the student is not sure
    scored = fitted.with_negatives(flat)
    assert scored.confidence == fitted.confidence
    negatives = scored.threshold["negatives"]
    accepted = fitted.confidence.accepted(fitted.confidence.probabilities(flat), CLASSES)
    assert negatives["false_acceptance_percent"] == 100 * accepted.mean()
    assert (negatives["images"], negatives["auroc"] > 0.9) == (80, True)


def test_the_top1_of_all_parts_is_that_of_their_images_together() -> None:
    gate, unseen = answered(1, 30), answered(2, 70)
    logits = np.concatenate([gate.logits, unseen.logits])
    assert gate.part.labels is not None
    assert unseen.part.labels is not None
    labels = np.concatenate([gate.part.labels, unseen.part.labels])
    assert top1_of([gate, unseen]) == (pytest.approx(100 * (logits.argmax(axis=1) == labels).mean()), 100)
    assert top1_of([gate, answered(3, labelled=False)]) is None


def manifest_of(fitted: FittedConfidence, gate: Answered, unseen: Answered) -> dict[str, Any]:
    return {
        "calibration": fitted.calibration,
        "threshold": fitted.threshold,
        "classes_added": [],
        "images": {"fit": vars(unseen.part.size)},
        "precisions": {"fp32": {"confidence": fitted.figures(gate.logits)}},
    }


def test_sentences_name_the_figures_and_an_older_manifest_has_none() -> None:
    gate, unseen = answered(1), answered(2)
    fitted, _ = fit(gate, unseen)
    temperature, threshold = confidence_lines(manifest_of(fitted, gate, unseen))
    assert f"softmax(logits / {fitted.confidence.temperature:g})" in temperature
    assert "labels of 300 test images" in temperature
    assert f"is below {fitted.confidence.threshold:g}" in threshold
    assert f"fp32 accepts {fitted.figures(gate.logits)['accepted_percent']:.1f} %" in threshold
    assert "not measured on images that show none of the classes" in threshold
    assert confidence_lines({"precisions": {}}) == []


def test_sentences_say_why_nothing_is_fitted() -> None:
    fitted, _ = fit(answered(1), None, no_fit="there are too few images")
    lines = confidence_lines(manifest_of(fitted, answered(1), answered(2)))
    assert all("there are too few images" in line for line in lines)
