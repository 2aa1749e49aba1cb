"""Tip-Adapter and Tip-Adapter-F: class vectors with a cache of few-shot features (arXiv 2207.09519)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from comkd_cli.method.linear_probe import Labelled

# The paper's residual ratio and sharpness, used where no validation images can choose them.
ALPHA, BETA = 1.0, 5.5
MOST_ALPHA, MOST_BETA = 3.0, 7.0  # of the search, with the bounds that the released code has for most datasets
ALPHA_STEPS, BETA_STEPS = 20, 200
FINE_TUNING_EPOCHS, LEARNING_RATE, EPSILON, BATCH_SIZE = 20, 1e-3, 1e-4, 256


def tip_adapter(
    cache: Labelled,
    val: Labelled,
    test: Tensor,
    class_vectors: Tensor,
    logit_scale: float,
    fine_tune_seed: int | None,
) -> np.ndarray:
    """The classes of test features, by class vectors and cache together.

    logits = s f W^T + alpha * exp(-beta (1 - f K^T)) L, K being the few-shot features and L their one-hot
    labels. alpha and beta are chosen on the validation features by the released code's grid search; without
    validation features they are the paper's 1 and 5.5. fine_tune_seed: of the order of the batches in which K is
    trained first (Tip-Adapter-F: AdamW at 1e-3, 20 epochs, cosine); None leaves K as it is (Tip-Adapter). Unlike the
    released code, the features are those of the centre crop alone, and the last epoch is used, not the best on the
    test images. test: (images, dim). class_vectors: (classes, dim). Returns (images,) class indices.
    """
    keys = cache.features
    values = nn.functional.one_hot(cache.labels, len(class_vectors)).float()
    if fine_tune_seed is not None:
        keys = _fine_tuned(cache, values, class_vectors, logit_scale, fine_tune_seed)
    alpha, beta = _search(keys, values, val, class_vectors, logit_scale) if len(val.labels) else (ALPHA, BETA)
    logits = logit_scale * test @ class_vectors.T + alpha * _cache_logits(test, keys, values, beta)
    return logits.argmax(dim=1).numpy()


def _cache_logits(features: Tensor, keys: Tensor, values: Tensor, beta: float) -> Tensor:
    return torch.exp(-beta * (1 - features @ keys.T)) @ values


def _search(
    keys: Tensor, values: Tensor, val: Labelled, class_vectors: Tensor, logit_scale: float
) -> tuple[float, float]:
    """alpha and beta of the highest accuracy on the validation features; of equal ones, the first."""
    clip = logit_scale * val.features @ class_vectors.T
    best, chosen = -1.0, (ALPHA, BETA)
    for step in range(BETA_STEPS):
        beta = 0.1 + step * (MOST_BETA - 0.1) / BETA_STEPS
        cached = _cache_logits(val.features, keys, values, beta)
        for alpha_step in range(ALPHA_STEPS):
            alpha = 0.1 + alpha_step * (MOST_ALPHA - 0.1) / ALPHA_STEPS
            accuracy = float(((clip + alpha * cached).argmax(dim=1) == val.labels).float().mean())
            if accuracy > best:
                best, chosen = accuracy, (alpha, beta)
    return chosen


def _fine_tuned(cache: Labelled, values: Tensor, class_vectors: Tensor, logit_scale: float, seed: int) -> Tensor:
    keys = nn.Parameter(cache.features.clone())
    optimizer = torch.optim.AdamW([keys], lr=LEARNING_RATE, eps=EPSILON)
    batches = -(-len(cache.labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FINE_TUNING_EPOCHS * batches)
    order = torch.Generator().manual_seed(seed)
    for _ in range(FINE_TUNING_EPOCHS):
        for chosen in torch.split(torch.randperm(len(cache.labels), generator=order), BATCH_SIZE):
            features, labels = cache.features[chosen], cache.labels[chosen]
            clip = logit_scale * features @ class_vectors.T
            loss = nn.functional.cross_entropy(clip + ALPHA * _cache_logits(features, keys, values, BETA), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return keys.detach()
