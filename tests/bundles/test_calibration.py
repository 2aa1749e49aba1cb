"""Temperature, threshold and their figures, beside a grid, a formula by hand and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from comkd_cli.bundles.calibration import (
    LEAST_OF_CLASS,
    calibration_error_percent,
    class_thresholds,
    fit_temperature,
    fit_threshold,
    least_images,
    score_negatives,
)


def drawn(temperature: float, images: int = 400, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are drawn from softmax(logits / temperature)."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 4, (images, classes)).astype(np.float32)
    shares = softmax(logits.astype(np.float64) / temperature, axis=1).cumsum(axis=1)
    return logits, (random.random((images, 1)) < shares).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_has_the_least_likelihood_loss_of_a_grid(temperature: float) -> None:
    logits, labels = drawn(temperature)
    grid = np.arange(0.2, 5, 0.005)
    losses = [-np.log(softmax(logits / t, axis=1)[np.arange(len(labels)), labels]).mean() for t in grid]
    best = grid[int(np.argmin(losses))]
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(best, abs=0.005)
    assert found == pytest.approx(temperature, rel=0.25)  # from which the labels were drawn


def test_a_teachers_temperature_is_found_in_its_soft_answers() -> None:
    logits, _ = drawn(1.0)
    assert fit_temperature(logits, softmax(logits.astype(np.float64) / 3, axis=1)) == 3


def test_labels_as_probabilities_give_the_temperature_of_the_labels() -> None:
    logits, labels = drawn(2.0)
    assert fit_temperature(logits, np.eye(6)[labels]) == fit_temperature(logits, labels)


@pytest.mark.parametrize("best", [True, False])
def test_labels_that_determine_no_temperature_give_none(best: bool) -> None:
    logits, _ = drawn(1.0)
    assert fit_temperature(logits, logits.argmax(axis=1) if best else logits.argmin(axis=1)) is None


@given(st.integers(19, 300), st.integers(0, 10_000))
def test_at_least_95_percent_of_the_images_of_the_fit_are_accepted(images: int, seed: int) -> None:
    scores = np.random.default_rng(seed).random(images)
    threshold = fit_threshold(scores, 95)
    assert threshold is not None
    assert np.mean(scores >= threshold) >= 0.95
    # A threshold above the next larger scores would accept too few: at most the rounding lies between.
    rank = math.floor(0.05 * (images + 1) + 1e-9)
    assert np.mean(scores >= threshold + 1e-4 + 1e-12) <= (images - rank) / images + np.mean(
        np.abs(scores - threshold) < 2e-4
    )


@pytest.mark.parametrize("accept", [80.0, 95.0, 99.0])
def test_new_images_are_accepted_with_the_probability_that_is_asked_for(accept: float) -> None:
    random = np.random.default_rng(1)
    shares = []
    for _ in range(2000):
        threshold = fit_threshold(random.random(150), accept)
        assert threshold is not None
        shares.append(1 - threshold)  # of new scores, which are uniform
    # Of split conformal prediction: between `accept` and 1 / (images + 1) more, and here 1e-4 for the rounding.
    low, high = accept / 100, accept / 100 + 1 / 151 + 1e-4
    assert low - 0.002 < np.mean(shares) < high + 0.002


@pytest.mark.parametrize(("accept", "least"), [(50, 1), (90, 9), (95, 19), (98, 49), (99, 99), (99.9, 999)])
def test_too_few_images_give_no_threshold(accept: float, least: int) -> None:
    assert least_images(accept) == least
    assert fit_threshold(np.linspace(0.1, 0.9, least), accept) == 0.1
    assert fit_threshold(np.linspace(0.1, 0.9, least - 1) if least > 1 else np.empty(0), accept) is None


def test_classes_that_are_answered_often_have_thresholds_of_their_own() -> None:
    count = LEAST_OF_CLASS
    random = np.random.default_rng(0)
    answers = np.repeat([0, 1, 2], [count, count - 1, 3 * count])
    scores = random.uniform(0.4, 1, len(answers))
    probabilities = np.repeat(((1 - scores) / 2)[:, None], 3, axis=1)
    probabilities[np.arange(len(answers)), answers] = scores
    found = class_thresholds(probabilities, ["a", "b", "c"], 90)
    assert list(found) == ["a", "c"]
    for name, label in (("a", 0), ("c", 2)):
        assert found[name] == fit_threshold(scores[answers == label], 90)
        assert 0.9 <= np.mean(scores[answers == label] >= found[name]) < 0.96


def test_the_calibration_error_is_that_of_the_formula_by_hand() -> None:
    # Two of 15 bins: (0.6, 0.667] has the confidences 0.61 and 0.65, one of them right; (0.867, 0.933] has 0.9, right.
    probabilities = np.array([[0.61, 0.39], [0.35, 0.65], [0.9, 0.1]])
    expected = 100 * (2 / 3 * abs(1 / 2 - (0.61 + 0.65) / 2) + 1 / 3 * abs(1 - 0.9))
    assert calibration_error_percent(probabilities, np.array([0, 0, 0])) == pytest.approx(expected)


def test_a_fitted_temperature_lowers_the_calibration_error_of_other_images() -> None:
    logits, labels = drawn(3.0, images=4000)
    temperature = fit_temperature(logits[:2000], labels[:2000])
    before, after = (
        calibration_error_percent(softmax(logits[2000:].astype(np.float64) / t, axis=1), labels[2000:])
        for t in (1.0, temperature)
    )
    assert after < before / 5


def test_negatives_are_scored_as_scikit_learn_scores_them() -> None:
    random = np.random.default_rng(0)
    positive, negative = random.normal(1, 1, 80), random.normal(0, 1, 50)
    found = score_negatives(positive, negative, negative >= 0.5)
    labels = np.r_[np.ones(80), np.zeros(50)]
    assert found.auroc == pytest.approx(roc_auc_score(labels, np.r_[positive, negative]))
    pairs = (positive[:, None] > negative).mean()  # the probability that an image of a class has the higher score
    assert found.auroc == pytest.approx(pairs)
    assert found.images == 50
    assert found.false_acceptance_percent == 100 * np.mean(negative >= 0.5)
    low, high = found.false_acceptance_interval_percent
    assert low < found.false_acceptance_percent < high
