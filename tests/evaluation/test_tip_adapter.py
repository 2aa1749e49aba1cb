import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from comkd_cli.evaluation import tip_adapter as module
from comkd_cli.evaluation.tip_adapter import tip_adapter
from comkd_cli.method.linear_probe import Classifier, Labelled

NOTHING = Labelled(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
EVEN, UNEVEN = [0, 0, 1, 1, 2, 2], [2, 0, 2, 2, 0, 2]  # of UNEVEN, one class has no image


def case(seed: int = 0, labels: list[int] = EVEN) -> tuple[Labelled, torch.Tensor, Classifier]:
    generator = torch.Generator().manual_seed(seed)
    cache = Labelled(normalize(torch.randn(6, 5, generator=generator), dim=1), torch.tensor(labels))
    test = normalize(torch.randn(40, 5, generator=generator), dim=1)
    return cache, test, Classifier(normalize(torch.randn(3, 5, generator=generator), dim=1), torch.tensor(2.0))


def by_hand(cache: Labelled, test: torch.Tensor, classifier: Classifier, alpha: float, beta: float) -> np.ndarray:
    keys, labels = cache.features.double().numpy(), cache.labels.numpy()
    answers = []
    for feature in test.double().numpy():
        logits = float(classifier.scale) * classifier.vectors.double().numpy() @ feature
        for key, label in zip(keys, labels, strict=True):
            logits[label] += alpha * np.exp(-beta * (1 - key @ feature))
        answers.append(logits.argmax())
    return np.array(answers)


@pytest.mark.parametrize("labels", [EVEN, UNEVEN])
def test_without_validation_images_it_is_the_papers_formula_at_1_and_5_5(labels: list[int]) -> None:
    cache, test, classifier = case(labels=labels)
    found = tip_adapter(cache, NOTHING, test, classifier, fine_tune_seed=None)
    assert np.array_equal(found, by_hand(cache, test, classifier, 1.0, 5.5))


@pytest.mark.parametrize("labels", [EVEN, UNEVEN])
@pytest.mark.parametrize("seed", range(2))
def test_alpha_and_beta_are_the_first_of_the_highest_accuracy_on_the_grid(seed: int, labels: list[int]) -> None:
    """Against every pair of the grid, one after another, with dense one-hot labels."""
    cache, test, classifier = case(seed, labels)
    val = Labelled(test[:20], torch.arange(20) % 3)
    clip = classifier.scale.double() * val.features.double() @ classifier.vectors.double().T
    affinity = val.features.double() @ cache.features.double().T
    best, chosen = -1.0, (0.0, 0.0)
    for beta in (0.1 + i * 6.9 / 200 for i in range(200)):
        cached = torch.exp(-beta * (1 - affinity)) @ one_hot(cache.labels, 3).double()
        for alpha in (0.1 + i * 2.9 / 20 for i in range(20)):
            accuracy = float(((clip + alpha * cached).argmax(dim=1) == val.labels).double().mean())
            if accuracy > best:
                best, chosen = accuracy, (alpha, beta)
    found = tip_adapter(cache, val, test, classifier, fine_tune_seed=None)
    assert np.array_equal(found, by_hand(cache, test, classifier, *chosen))


def test_fine_tuning_is_adamw_on_the_cross_entropy_of_the_combined_logits() -> None:
    """Against autograd and dense one-hot labels; 300 images make two batches of an epoch."""
    generator = torch.Generator().manual_seed(5)
    cache = Labelled(normalize(torch.randn(300, 64, generator=generator), dim=1), torch.arange(300) % 7)
    test = normalize(torch.randn(400, 64, generator=generator), dim=1)
    classifier = Classifier(normalize(torch.randn(7, 64, generator=generator), dim=1), torch.tensor(0.5))
    keys = torch.nn.Parameter(cache.features.clone())
    values = one_hot(cache.labels, 7).float()
    optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20 * 2)

    def logits(features: torch.Tensor) -> torch.Tensor:
        clip = classifier.scale * features @ classifier.vectors.T
        return clip + torch.exp(-5.5 * (1 - features @ keys.T)) @ values

    order = torch.Generator().manual_seed(2)
    for _ in range(20):
        for chosen in torch.split(torch.randperm(300, generator=order), 256):
            optimizer.zero_grad()
            cross_entropy(logits(cache.features[chosen]), cache.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    expected = logits(test).argmax(dim=1).numpy()
    found = tip_adapter(cache, NOTHING, test, classifier, fine_tune_seed=2)
    assert np.mean(found == expected) >= 0.995
    assert np.mean(tip_adapter(cache, NOTHING, test, classifier, fine_tune_seed=None) == expected) < 0.95


def test_fine_tuning_is_reproducible_and_leaves_the_cache_as_it_was() -> None:
    cache, test, classifier = case(3, UNEVEN)
    before = cache.features.clone()
    tuned, again = (tip_adapter(cache, NOTHING, test, classifier, fine_tune_seed=1) for _ in range(2))
    assert np.array_equal(tuned, again)
    assert torch.equal(cache.features, before)


def test_the_images_that_are_processed_at_once_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, test, classifier = case(1)
    val = Labelled(test[:20], torch.arange(20) % 3)
    whole = tip_adapter(cache, val, test, classifier, fine_tune_seed=None)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 6 * 13)
    monkeypatch.setattr(module, "PAIRS_IN_CACHE", 6 * 9)
    assert np.array_equal(tip_adapter(cache, val, test, classifier, fine_tune_seed=None), whole)
