import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from comkd_cli.evaluation.linear_probe import best_c, linear_probe


@pytest.mark.parametrize("peak", [-6.0, -3.375, 0.0, 0.125, 2.5, 6.0])
def test_the_search_finds_the_peak_to_an_eighth_of_a_decade(peak: float) -> None:
    assert math.log10(best_c(lambda c: -abs(math.log10(c) - peak))) == pytest.approx(peak, abs=1e-9)


def test_the_search_tries_no_c_twice_and_few_in_all() -> None:
    tried: list[float] = []
    best_c(lambda c: tried.append(c) or -abs(math.log10(c) - 1.7))  # type: ignore[func-returns-value]
    assert len(tried) == len(set(tried))
    assert len(tried) <= 7 + 2 * 4


def test_of_equals_the_smaller_c_wins() -> None:
    assert best_c(lambda c: 1.0) == pytest.approx(1e-6)


def blobs(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return random.normal(size=(count, 4)) + 2.0 * np.eye(3, 4)[labels], labels


def test_without_validation_images_it_is_scikit_learns_regression_at_one() -> None:
    (train, train_labels), (test, _) = blobs(0, 30), blobs(1, 60)
    expected = LogisticRegression(C=1.0, max_iter=1000).fit(train, train_labels).predict(test)
    found = linear_probe(train, train_labels, np.empty((0, 4)), np.empty(0), test)
    assert np.array_equal(found, expected)


def test_the_c_that_is_best_on_validation_images_is_taken() -> None:
    (train, train_labels), (val, val_labels), (test, _) = blobs(0, 12), blobs(2, 90), blobs(1, 60)
    found = linear_probe(train, train_labels, val, val_labels, test)

    def accuracy(c: float) -> float:
        return float(LogisticRegression(C=c, max_iter=1000).fit(train, train_labels).score(val, val_labels))

    c = best_c(accuracy)
    assert accuracy(c) >= max(accuracy(10.0**e) for e in range(-6, 7, 2))
    assert np.array_equal(found, LogisticRegression(C=c, max_iter=1000).fit(train, train_labels).predict(test))


def test_one_image_of_each_of_many_classes_is_learned_without_a_warning() -> None:
    """scikit-learn takes as many classes as images for a regression; warnings are errors here."""
    random = np.random.default_rng(0)
    train, labels = 3 * random.normal(size=(40, 64)), np.arange(40)
    test = np.repeat(train, 2, axis=0) + 0.01 * random.normal(size=(80, 64))
    found = linear_probe(train, labels, train, labels, test)
    assert np.array_equal(found, np.repeat(labels, 2))
