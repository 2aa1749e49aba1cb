import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from comkd_cli.evaluation.linear_probe import best_c, linear_probe
from comkd_cli.method.linear_probe import Labelled


@pytest.mark.parametrize("peak", [-6.0, -3.375, 0.0, 0.125, 2.5, 6.0])
def test_the_search_finds_the_peak_to_an_eighth_of_a_decade(peak: float) -> None:
    found = best_c(lambda cs: [-abs(math.log10(c) - peak) for c in cs])
    assert math.log10(found) == pytest.approx(peak, abs=1e-9)


def test_the_search_tries_no_c_twice_and_few_in_all() -> None:
    tried: list[float] = []

    def accuracies(cs: Sequence[float]) -> list[float]:
        tried.extend(cs)
        return [-abs(math.log10(c) - 1.7) for c in cs]

    best_c(accuracies)
    assert len(tried) == len(set(tried))
    assert len(tried) <= 7 + 2 * 4


def test_of_equals_the_smaller_c_wins() -> None:
    assert best_c(lambda cs: [1.0] * len(cs)) == pytest.approx(1e-6)


def blobs(seed: int, count: int) -> Labelled:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = random.normal(size=(count, 4)) + 2.0 * np.eye(3, 4)[labels]
    return Labelled(torch.from_numpy(features), torch.from_numpy(labels))


def scikit_learns(train: Labelled, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000).fit(train.features.numpy(), train.labels.numpy())


def test_without_validation_images_it_is_scikit_learns_regression_at_one() -> None:
    train, test = blobs(0, 30), blobs(1, 60).features
    nothing = Labelled(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert np.array_equal(linear_probe(train, nothing, test), scikit_learns(train, 1.0).predict(test.numpy()))


def test_the_c_that_is_best_on_validation_images_is_taken() -> None:
    train, val, test = blobs(0, 12), blobs(2, 90), blobs(1, 60).features

    def accuracy(c: float) -> float:
        return float(scikit_learns(train, c).score(val.features.numpy(), val.labels.numpy()))

    c = best_c(lambda cs: [accuracy(each) for each in cs])
    assert accuracy(c) >= max(accuracy(10.0**e) for e in range(-6, 7, 2))
    assert np.array_equal(linear_probe(train, val, test), scikit_learns(train, c).predict(test.numpy()))


def test_one_image_of_each_of_many_classes_is_learned() -> None:
    random = np.random.default_rng(0)
    train = Labelled(torch.from_numpy(3 * random.normal(size=(40, 64))), torch.arange(40))
    test = train.features.repeat_interleave(2, dim=0) + 0.01
    assert np.array_equal(linear_probe(train, train, test), np.repeat(np.arange(40), 2))


def test_its_progress_never_falls_and_never_exceeds_one() -> None:
    shares: list[float] = []
    linear_probe(blobs(0, 12), blobs(2, 90), blobs(1, 60).features, shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
