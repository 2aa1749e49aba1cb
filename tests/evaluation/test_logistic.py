import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from comkd_cli.evaluation.lbfgs import Stopping
from comkd_cli.evaluation.logistic import Regressions
from comkd_cli.method.linear_probe import Labelled

CS = (1e-4, 1e-2, 1.0, 10.0, 100.0, 1e4, 1e6)


def clouds(classes: int, shots: int, dim: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit features with a common mean, as CLIP's: training ones with their labels, and 1,000 test ones."""
    random = np.random.default_rng(classes)
    common, centres = 1.5 * random.normal(size=dim), random.normal(size=(classes, dim))
    labels = np.repeat(np.arange(classes), shots)
    of_all = np.concatenate([labels, random.integers(0, classes, 1000)])
    features = common + centres[of_all] + noise * random.normal(size=(len(of_all), dim))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    return features[: len(labels)], labels, features[len(labels) :]


@pytest.mark.parametrize(("classes", "shots", "dim", "noise"), [(20, 8, 64, 3.0), (12, 3, 96, 2.0), (2, 16, 32, 4.0)])
def test_the_answers_are_scikit_learns_for_each_c(classes: int, shots: int, dim: int, noise: float) -> None:
    train, labels, test = clouds(classes, shots, dim, noise)
    regressions = Regressions(Labelled(torch.from_numpy(train), torch.from_numpy(labels)))
    for c, weights in zip(CS, regressions.fit(CS), strict=True):
        reference = LogisticRegression(C=c, max_iter=1000).fit(train.astype(np.float64), labels)
        found = regressions.predict(weights, torch.from_numpy(test)).numpy()
        assert np.mean(found == reference.predict(test.astype(np.float64))) >= 0.999
        assert weights.numpy() == pytest.approx(np.c_[reference.coef_, reference.intercept_], rel=1e-3, abs=1e-3)


def test_the_minimum_is_scikit_learns_where_both_go_on_to_it() -> None:
    train, labels, _ = clouds(5, 6, 16, 2.0)
    regressions = Regressions(Labelled(torch.from_numpy(train), torch.from_numpy(labels)))
    (weights,) = regressions.fit([3.0], Stopping(gradient=1e-9, decrease=0.0))
    reference = LogisticRegression(C=3.0, max_iter=5000, tol=1e-9, solver="newton-cg").fit(
        train.astype(np.float64), labels
    )
    assert weights.numpy() == pytest.approx(np.c_[reference.coef_, reference.intercept_], abs=1e-5)


def test_classes_without_images_are_never_predicted() -> None:
    train, labels, test = clouds(4, 6, 16, 2.0)
    labels = np.array([7, 2, 9, 4])[labels]
    regressions = Regressions(Labelled(torch.from_numpy(train), torch.from_numpy(labels)))
    (weights,) = regressions.fit([1.0])
    found = regressions.predict(weights, torch.from_numpy(test)).numpy()
    assert np.array_equal(found, LogisticRegression(max_iter=1000).fit(train.astype(np.float64), labels).predict(test))


def test_the_images_that_are_processed_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test = clouds(6, 5, 16, 3.0)
    images = Labelled(torch.from_numpy(train), torch.from_numpy(labels))
    whole, parts = Regressions(images), Regressions(images)
    monkeypatch.setattr(parts, "_at_once", 7 * 2 * 6)
    for one, other in zip(whole.fit([1.0, 100.0]), parts.fit([1.0, 100.0]), strict=True):
        assert other.numpy() == pytest.approx(one.numpy(), rel=1e-6, abs=1e-8)
        assert torch.equal(whole.predict(one, torch.from_numpy(test)), parts.predict(one, torch.from_numpy(test)))
