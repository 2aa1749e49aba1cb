import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from comkd_cli.evaluation.metrics import (
    agreement_percent,
    mean_per_class_percent,
    top1_percent,
    wilson_interval_percent,
)

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60)


@given(PAIRS)
def test_top1_is_scikit_learns_accuracy(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs).T
    assert top1_percent(predicted, labels) == pytest.approx(100 * accuracy_score(labels, predicted))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@given(PAIRS)
def test_mean_per_class_is_scikit_learns_balanced_accuracy(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs).T
    expected = 100 * balanced_accuracy_score(labels, predicted)
    assert mean_per_class_percent(predicted, labels) == pytest.approx(expected)


def test_mean_per_class_weighs_a_rare_class_as_a_common_one() -> None:
    labels = np.array([0] * 8 + [1, 1])
    predicted = np.array([0] * 8 + [0, 1])
    assert top1_percent(predicted, labels) == 90
    assert mean_per_class_percent(predicted, labels) == 75


@given(PAIRS)
def test_agreement_is_a_count_of_equal_answers_whichever_comes_first(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs).T
    expected = 100 * sum(a == b for a, b in pairs) / len(pairs)
    assert agreement_percent(first, second) == pytest.approx(expected)
    assert agreement_percent(second, first) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [top1_percent, mean_per_class_percent, agreement_percent])
def test_figures_are_plain_numbers_that_json_can_write(metric: object) -> None:
    value = metric(np.array([1, 2, 2]), np.array([1, 2, 0]))  # type: ignore[operator]
    assert type(value) is float


@given(st.integers(0, 400), st.integers(1, 400))
def test_the_interval_is_scipys_wilson_interval(right: int, count: int) -> None:
    right = min(right, count)
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    found = wilson_interval_percent(100 * right / count, count)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_the_interval_of_few_images_is_wide_even_where_all_are_right() -> None:
    low, high = wilson_interval_percent(100.0, 8)
    assert (round(low, 1), high) == (67.6, 100.0)  # 8 / (8 + 1.96 ** 2)


def test_no_images_have_no_interval() -> None:
    with pytest.raises(ValueError, match="no images"):
        wilson_interval_percent(100.0, 0)
