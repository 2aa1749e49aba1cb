import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from comkd_cli.evaluation.tip_adapter import tip_adapter
from comkd_cli.method.linear_probe import Labelled

NOTHING = Labelled(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))


def case(seed: int = 0) -> tuple[Labelled, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cache = Labelled(normalize(torch.randn(6, 5, generator=generator), dim=1), torch.tensor([0, 0, 1, 1, 2, 2]))
    test = normalize(torch.randn(40, 5, generator=generator), dim=1)
    return cache, test, normalize(torch.randn(3, 5, generator=generator), dim=1)


def by_hand(
    cache: Labelled, test: torch.Tensor, vectors: torch.Tensor, scale: float, alpha: float, beta: float
) -> np.ndarray:
    keys, labels = cache.features.numpy(), cache.labels.numpy()
    answers = []
    for feature in test.numpy():
        logits = scale * vectors.numpy() @ feature
        for key, label in zip(keys, labels, strict=True):
            logits[label] += alpha * np.exp(-beta * (1 - key @ feature))
        answers.append(logits.argmax())
    return np.array(answers)


def test_without_validation_images_it_is_the_papers_formula_at_1_and_5_5() -> None:
    cache, test, vectors = case()
    found = tip_adapter(cache, NOTHING, test, vectors, 2.0, fine_tune_seed=None)
    assert np.array_equal(found, by_hand(cache, test, vectors, 2.0, 1.0, 5.5))


def test_alpha_and_beta_are_the_best_of_the_grid_on_validation_images() -> None:
    cache, test, vectors = case()
    val = Labelled(test[:20], torch.arange(20) % 3)
    found = tip_adapter(cache, val, test, vectors, 2.0, fine_tune_seed=None)
    accuracy = float(np.mean(found[:20] == val.labels.numpy()))
    for alpha in (0.1, 1.0, 2.8):
        for beta in (0.1, 3.0, 6.9):
            other = by_hand(cache, Labelled(val.features, val.labels).features, vectors, 2.0, alpha, beta)
            assert accuracy >= float(np.mean(other == val.labels.numpy())) - 1e-9


def test_fine_tuning_fits_the_shots_better_and_is_reproducible() -> None:
    cache, _, vectors = case(3)
    plain = tip_adapter(cache, NOTHING, cache.features, vectors, 2.0, fine_tune_seed=None)
    tuned = tip_adapter(cache, NOTHING, cache.features, vectors, 2.0, fine_tune_seed=1)
    again = tip_adapter(cache, NOTHING, cache.features, vectors, 2.0, fine_tune_seed=1)
    assert np.array_equal(tuned, again)
    assert np.mean(tuned == cache.labels.numpy()) >= np.mean(plain == cache.labels.numpy())


@pytest.mark.parametrize("fine_tune_seed", [None, 1])
def test_the_cache_is_not_modified(fine_tune_seed: int | None) -> None:
    cache, test, vectors = case()
    before = cache.features.clone()
    tip_adapter(cache, NOTHING, test, vectors, 2.0, fine_tune_seed=fine_tune_seed)
    assert torch.equal(cache.features, before)
