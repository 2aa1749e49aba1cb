import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from comkd_cli.method.linear_probe import Classifier, Labelled, fit_head, fit_probe, unit_rows, validation_split

DIM, CLASSES = 6, 4


def images(count: int, seed: int = 0, classes: int = CLASSES) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return Labelled(normalize(centres[labels] + torch.randn(count, DIM, generator=generator), dim=1), labels)


def zero_shot(scale: float = 10.0) -> Classifier:
    vectors = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(5))
    return Classifier(normalize(vectors, dim=1), torch.tensor(scale))


def objective(rows: np.ndarray, found: Labelled, start: np.ndarray, strength: float) -> float:
    """-mean log-likelihood + strength / 2 * the mean squared distance of the rows from their start."""
    logits = found.features.double().numpy() @ rows.T
    likely = log_softmax(logits, axis=1)[np.arange(len(logits)), found.labels.numpy()]
    return float(-likely.mean() + strength / 2 * ((rows - start) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("strength", [3.0, 0.1, 0.003])
def test_the_head_is_scipys_optimum_of_the_same_objective(strength: float) -> None:
    found, classifier = images(40), zero_shot()
    start = 10.0 * classifier.vectors.double().numpy()
    features, onehot = found.features.double().numpy(), np.eye(CLASSES)[found.labels.numpy()]

    def gradient(flat: np.ndarray) -> np.ndarray:
        rows = flat.reshape(start.shape)
        residual = softmax(features @ rows.T, axis=1) - onehot
        return (residual.T @ features / len(features) + strength * (rows - start) / CLASSES).ravel()

    best = minimize(
        lambda flat: objective(flat.reshape(start.shape), found, start, strength),
        start.ravel(),
        jac=gradient,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-9},
    )
    head = fit_head(found, classifier, strength).numpy()
    np.testing.assert_allclose(head, best.x.reshape(start.shape), atol=1e-4)
    assert objective(head, found, start, strength) <= best.fun + 1e-10


def test_without_a_zero_shot_start_it_is_scikit_learns_logistic_regression() -> None:
    found, strength = images(60), 0.02
    nothing = Classifier(zero_shot().vectors, torch.tensor(0.0))
    c = CLASSES / (strength * len(found.labels))  # scikit-learn sums the losses and divides nothing by the classes
    fitted = LogisticRegression(C=c, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fitted.fit(found.features.double().numpy(), found.labels.numpy())
    np.testing.assert_allclose(fit_head(found, nothing, strength).numpy(), fitted.coef_, atol=1e-4)


def test_classes_without_images_keep_their_vector_and_still_compete() -> None:
    found, classifier = images(30, classes=CLASSES - 1), zero_shot()
    head = fit_head(found, classifier, 0.01)
    torch.testing.assert_close(head[-1], 10 * classifier.vectors[-1].double())
    assert not torch.allclose(head[0], 10 * classifier.vectors[0].double(), atol=0.1)
    away = Classifier(torch.cat([classifier.vectors[:-1], -classifier.vectors[-1:]]), classifier.scale)
    assert not torch.allclose(fit_head(found, away, 0.01)[:-1], head[:-1], atol=1e-3)


def test_the_fit_is_the_same_twice_and_stays_at_zero_shot_at_a_large_strength() -> None:
    found, classifier = images(40), zero_shot()
    assert torch.equal(fit_head(found, classifier, 0.1), fit_head(found, classifier, 0.1))
    start = 10 * classifier.vectors.double()
    torch.testing.assert_close(fit_head(found, classifier, 1e7), start, atol=1e-5, rtol=0)


def test_rows_of_one_length_become_unit_vectors_with_equal_logits() -> None:
    head = 7 * normalize(torch.randn(3, 5, dtype=torch.float64), dim=1)
    classifier = unit_rows(head)
    features = normalize(torch.randn(4, 5), dim=1)
    torch.testing.assert_close(classifier.scale * features @ classifier.vectors.T, features @ head.float().T)
    mixed = unit_rows(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    assert float(mixed.scale) == 4.0
    torch.testing.assert_close(mixed.vectors, torch.eye(2))


def test_a_share_of_each_class_is_held_out_at_least_one_and_never_all() -> None:
    labels = [0] * 10 + [1] * 3 + [2] * 2 + [3]
    train, validation = validation_split(labels, 20.0, seed=1)
    assert sorted(train + validation) == list(range(16))
    assert [sum(labels[i] == label for i in validation) for label in range(4)] == [2, 1, 1, 0]
    assert validation_split(labels, 20.0, seed=1)[1] == validation
    assert validation_split(labels, 20.0, seed=2)[1] != validation
    assert [sum(labels[i] == label for i in validation_split(labels, 99.0, 1)[0]) for label in range(4)] == [1] * 4


def test_the_strength_is_chosen_on_held_out_images_and_the_head_fitted_to_all() -> None:
    found, classifier = images(200), zero_shot()
    strengths = (1e-3, 1.0, 1e6)
    probe = fit_probe(found, classifier, strengths, 25.0, seed=3)
    train, validation = validation_split(found.labels.tolist(), 25.0, seed=3)
    scores = {}
    for strength in strengths:
        rows = normalize(fit_head(found.subset(train), classifier, strength), dim=1)
        predicted = (found.features[validation].double() @ rows.T).argmax(dim=1)
        scores[strength] = 100 * float((predicted == found.labels[validation]).double().mean())
    before = (found.features[validation] @ classifier.vectors.T).argmax(dim=1) == found.labels[validation]
    assert probe.zero_shot_top1_percent == pytest.approx(100 * float(before.double().mean()))
    assert probe.top1_percent == pytest.approx(max(scores.values()))
    assert probe.strength == max(strength for strength in strengths if scores[strength] == max(scores.values()))
    assert (probe.improves, probe.validation_images) == (True, len(validation))
    expected = unit_rows(fit_head(found, classifier, probe.strength))
    torch.testing.assert_close(probe.classifier.vectors, expected.vectors)
    torch.testing.assert_close(probe.classifier.scale, expected.scale)


def test_zero_shot_is_kept_where_no_head_is_better() -> None:
    found = images(40)
    centres = torch.stack([found.features[found.labels == label].mean(0) for label in range(CLASSES)])
    perfect = Labelled(normalize(centres, dim=1).repeat(3, 1), torch.arange(CLASSES).repeat(3))
    classifier = Classifier(normalize(centres, dim=1), torch.tensor(50.0))
    probe = fit_probe(perfect, classifier, (1.0, 0.1), 30.0, seed=1)
    assert probe.zero_shot_top1_percent == 100.0
    assert not probe.improves
    assert probe.classifier is classifier


def test_images_that_leave_none_to_validate_on_are_refused() -> None:
    with pytest.raises(ValueError, match="two labelled images"):
        fit_probe(images(CLASSES), zero_shot(), (1.0,), 20.0, seed=1)


def test_the_loss_of_two_images_is_the_figure_worked_by_hand() -> None:
    """Of one dimension: the rows of a symmetric problem are +-v, where sigmoid(-2 v) * 2 = strength * v."""
    found = Labelled(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    head = fit_head(found, Classifier(torch.tensor([[1.0], [-1.0]]), torch.tensor(0.0)), 0.5)
    v = float(head[0, 0])
    assert float(head[1, 0]) == pytest.approx(-v)
    # d/dv of log(1 + exp(-2 v)) + strength / 2 * v^2
    assert 2 / (1 + math.exp(2 * v)) == pytest.approx(0.5 * v, abs=1e-6)
