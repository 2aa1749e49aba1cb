import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import confusion_matrix as scikit_matrix
from sklearn.metrics import precision_recall_fscore_support

from comkd_cli.evaluation.metrics import mean_per_class_percent, wilson_interval_percent
from comkd_cli.report.statistics import (
    calibration,
    class_scores,
    confusion_matrix,
    confusions,
    difference_interval,
    mean_per_class_interval,
    share_interval,
)

CLASSES = 4
PAIRS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=60)


def draw(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of which about 80 % are right, to images of unequal classes."""
    random = np.random.default_rng(seed)
    labels = random.choice(CLASSES, images, p=[0.5, 0.3, 0.15, 0.05])
    return np.where(random.random(images) < 0.8, labels, random.integers(0, CLASSES, images)), labels


@pytest.mark.parametrize(("images", "seed"), [(120, 1), (900, 2)])
def test_the_interval_of_a_share_is_scipys_percentile_bootstrap(images: int, seed: int) -> None:
    predicted, labels = draw(images, seed)
    right = predicted == labels
    expected = stats.bootstrap((right,), np.mean, method="percentile", n_resamples=9999, rng=5).confidence_interval
    found = share_interval(right)
    step = 100 / images  # bootstrap quantiles of a share are whole images
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1.01 * step)


def test_the_interval_of_the_mean_per_class_is_scipys_percentile_bootstrap() -> None:
    predicted, labels = draw(400, 3)
    expected = stats.bootstrap(
        (predicted, labels),
        mean_per_class_percent,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=3000,
        rng=5,
    ).confidence_interval
    found = mean_per_class_interval(predicted, labels)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.6)


def test_the_interval_of_a_difference_is_scipys_and_takes_pairs_together() -> None:
    predicted, labels = draw(500, 4)
    other = np.where(np.random.default_rng(9).random(500) < 0.05, 0, predicted)
    first, second = predicted == labels, other == labels
    expected = stats.bootstrap(
        (first.astype(float) - second,), np.mean, method="percentile", n_resamples=9999, rng=5
    ).confidence_interval
    found = difference_interval(first, second)
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.21)
    alone = share_interval(first)
    assert found.high - found.low < (alone.high - alone.low) / 2


@pytest.mark.parametrize("value", [True, False])
def test_where_all_answers_are_alike_the_interval_is_wilsons(value: bool) -> None:
    found = share_interval(np.full(12, value))
    assert (found.low, found.high) == wilson_interval_percent(100.0 * value, 12)


def test_the_same_answers_have_the_same_intervals() -> None:
    predicted, labels = draw(200, 5)
    assert mean_per_class_interval(predicted, labels) == mean_per_class_interval(predicted, labels)


@given(PAIRS)
def test_scores_of_classes_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs).T
    precision, recall, _, support = precision_recall_fscore_support(
        labels, predicted, labels=range(CLASSES), zero_division=np.nan
    )
    rows = class_scores(predicted, labels, CLASSES)
    for found, expected in (([row.precision for row in rows], precision), ([row.recall for row in rows], recall)):
        assert [np.nan if value is None else value for value in found] == pytest.approx(list(expected), nan_ok=True)
    assert [row.support for row in rows] == list(support)
    assert sum(row.errors for row in rows) == 2 * int((predicted != labels).sum())


@given(PAIRS)
def test_confusions_are_those_of_scikit_learns_matrix(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs).T
    expected = scikit_matrix(labels, predicted, labels=range(CLASSES))
    assert (confusion_matrix(predicted, labels, CLASSES) == expected).all()
    found = confusions(predicted, labels, CLASSES)
    assert {(pair.actual, pair.answered): pair.images for pair in found} == {
        (i, j): expected[i, j] for i in range(CLASSES) for j in range(CLASSES) if i != j and expected[i, j]
    }
    assert [pair.images for pair in found] == sorted((pair.images for pair in found), reverse=True)
    assert all(pair.share == pytest.approx(pair.images / expected[pair.actual].sum()) for pair in found)


def test_the_calibration_error_is_the_formula_over_the_bins() -> None:
    random = np.random.default_rng(6)
    confidence, right = random.uniform(0, 1, 300), random.random(300) < 0.6
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = calibration(confidence, right)
    assert found.expected_error_percent == pytest.approx(100 * expected)
    assert sum(part.images for part in found.bins) == 300
    assert [part.confidence for part in found.bins] == sorted(part.confidence for part in found.bins)


def test_confidence_of_exactly_0_and_1_has_a_bin() -> None:
    found = calibration(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]))
    assert [(part.images, part.confidence, part.accuracy) for part in found.bins] == [(1, 0, 0), (2, 1, 0.5)]
    assert found.expected_error_percent == pytest.approx(100 / 3)
