"""Tip-Adapter and Tip-Adapter-F: class vectors with a cache of few-shot features (arXiv 2207.09519)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from comkd_cli.method.linear_probe import Classifier, Labelled

# The paper's residual ratio and sharpness, used if no validation images can choose them.
ALPHA, BETA = 1.0, 5.5
MOST_ALPHA, MOST_BETA = 3.0, 7.0  # of the search, with the bounds that the released code has for most datasets
ALPHA_STEPS, BETA_STEPS = 20, 200
EXACT_EVERY = 10  # betas of the search; those between follow by products, which round as much as an exponential does
FINE_TUNING_EPOCHS, LEARNING_RATE, EPSILON, BATCH_SIZE = 20, 1e-3, 1e-4, 256
PAIRS_AT_ONCE, PAIRS_AT_ONCE_GPU = 1 << 22, 1 << 26  # of images and keys: memory does not grow with the images
PAIRS_IN_CACHE = 1 << 18  # that the search passes over 200 times: on a CPU they stay in the processor's cache
SEARCH_SHARE = 0.2  # of the work of fine-tuning and search, roughly

Advance = Callable[[float], None]
"""Called with the share of the work that is done, in [0, 1]."""


def tip_adapter(
    cache: Labelled,
    val: Labelled,
    test: Tensor,
    zero_shot: Classifier,
    fine_tune_seed: int | None,
    advance: Advance = lambda share: None,
) -> np.ndarray:
    """The classes of test features, by class vectors and cache together.

    logits = s f W^T + alpha * exp(-beta (1 - f K^T)) L, K being the few-shot features and L their one-hot
    labels. alpha and beta are chosen on the validation features by the released code's grid search; without
    validation features they are the paper's 1 and 5.5. fine_tune_seed: of the order of the batches in which K is
    trained first (Tip-Adapter-F: AdamW at 1e-3, 20 epochs, cosine); None leaves K as it is (Tip-Adapter). Unlike the
    released code, the features are those of the centre crop alone, and the last epoch is used, not the best on the
    test images. test: (images, dim). All on one device. Returns (images,) class indices.
    """
    keys = _Keys(cache, len(zero_shot.vectors))
    if fine_tune_seed is not None:
        _fine_tune(keys, cache, zero_shot, fine_tune_seed, advance)
    alpha, beta = _search(keys, val, zero_shot) if len(val.labels) else (ALPHA, BETA)
    answers = [
        torch.add(_logits(part, zero_shot), keys.class_sums(keys.closeness(part).mul_(beta).exp_()), alpha=alpha)
        .argmax(dim=1)
        .cpu()
        for part in torch.split(test, keys.images_at_once)
    ]
    advance(1.0)
    return torch.cat(answers).numpy()


def _logits(features: Tensor, zero_shot: Classifier) -> Tensor:
    return zero_shot.scale * features @ zero_shot.vectors.T


class _Keys:
    """The few-shot features, in layers that hold at most one of each class.

    The product with one-hot labels is then a sum over the layers. The place of a class that has fewer features than
    others is empty, and no image is close to it.
    """

    def __init__(self, cache: Labelled, classes: int) -> None:
        counts = torch.bincount(cache.labels, minlength=classes)
        order = torch.argsort(cache.labels, stable=True)
        layers = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[cache.labels[order]]
        places = layers * classes + cache.labels[order]
        self.classes, self.layers = classes, int(counts.max())
        self.values = cache.features.new_zeros(self.layers * classes, cache.features.shape[1])
        self.values[places] = cache.features[order]
        empty = torch.ones(len(self.values), dtype=torch.bool, device=places.device)
        empty[places] = False
        self._empty = empty.nonzero()[:, 0]
        pairs = PAIRS_AT_ONCE if places.device.type == "cpu" else PAIRS_AT_ONCE_GPU
        self.images_at_once = max(1, pairs // len(self.values))
        self.images_in_cache = max(1, PAIRS_IN_CACHE // len(self.values)) if places.device.type == "cpu" else None

    def closeness(self, features: Tensor) -> Tensor:
        """f K^T - 1, (images, keys), minus infinity for empty places. features: (images, dim)."""
        found = (features @ self.values.T).sub_(1)
        return found.index_fill_(1, self._empty, float("-inf")) if len(self._empty) else found

    def by_layer(self, pairs: Tensor) -> Tensor:
        """(images, keys) as (images, layers, classes)."""
        return pairs.view(len(pairs), self.layers, self.classes)

    def class_sums(self, pairs: Tensor) -> Tensor:
        """The sum over the keys of each class, (images, classes). pairs: (images, keys)."""
        return self.by_layer(pairs).sum(dim=1)


def _search(keys: _Keys, val: Labelled, zero_shot: Classifier) -> tuple[float, float]:
    """alpha and beta of the highest accuracy on the validation features; if several are equal, the first."""
    device = val.labels.device
    alphas = [0.1 + step * (MOST_ALPHA - 0.1) / ALPHA_STEPS for step in range(ALPHA_STEPS)]
    betas = [0.1 + step * (MOST_BETA - 0.1) / BETA_STEPS for step in range(BETA_STEPS)]
    right = torch.zeros(BETA_STEPS, ALPHA_STEPS, dtype=torch.int64, device=device)
    tried = torch.tensor(alphas, device=device)
    for features, labels in _split(val, keys.images_at_once):
        pairs = keys.closeness(features)
        own = labels[:, None]
        clip = _logits(features, zero_shot)
        leads = clip - clip.gather(1, own)  # of each class over the image's own
        for part in torch.split(torch.arange(len(labels), device=device), keys.images_in_cache or len(labels)):
            for step, cached in enumerate(_of_each_beta(keys, pairs[part], betas)):
                least, most = _range_of_alpha(leads[part], cached.gather(1, own[part]) - cached)
                right[step] += ((least[:, None] <= tried) & (tried <= most[:, None])).sum(dim=0)
    chosen = int(right.flatten().argmax())
    return alphas[chosen % ALPHA_STEPS], betas[chosen // ALPHA_STEPS]


def _split(images: Labelled, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(images.features, size), torch.split(images.labels, size), strict=True)


def _of_each_beta(keys: _Keys, closeness: Tensor, betas: list[float]) -> Iterator[Tensor]:
    """The cache's logits by each of evenly spaced betas, (images, classes). closeness: (images, keys)."""
    growth = (closeness * (betas[1] - betas[0])).exp_()
    powers = torch.empty_like(closeness)
    for step, beta in enumerate(betas):
        if step % EXACT_EVERY:
            powers *= growth
        else:
            torch.mul(closeness, beta, out=powers).exp_()
        yield keys.class_sums(powers)


def _range_of_alpha(leads: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most alpha by which each image's own class has the largest logit, (images,) each.

    For each other class alpha * gain >= lead must hold: a lower bound if the gain is positive, an upper one if it
    is negative. So every alpha is judged in one pass. leads: of each class over the image's own, by the class vectors;
    gains: of the own over each class, by the cache; (images, classes). The least is above the most if none does.
    """
    bounds = leads / gains
    least = bounds.masked_fill(gains <= 0, float("-inf")).amax(dim=1)
    most = bounds.masked_fill_(gains >= 0, float("inf")).amin(dim=1)
    never = ((gains == 0) & (leads > 0)).any(dim=1)
    return least.masked_fill_(never, float("inf")), most


def _fine_tune(keys: _Keys, cache: Labelled, zero_shot: Classifier, seed: int, advance: Advance) -> None:
    """Train the keys on the images that they are features of, by the cross-entropy of the combined logits."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(keys.values)], lr=LEARNING_RATE, eps=EPSILON, fused=True)
    values = optimizer.param_groups[0]["params"][0]
    batches = -(-len(cache.labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FINE_TUNING_EPOCHS * batches)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(FINE_TUNING_EPOCHS):
        for chosen in torch.split(torch.randperm(len(cache.labels), generator=order), BATCH_SIZE):
            chosen = chosen.to(cache.labels.device)
            values.grad = _gradient(keys, Labelled(cache.features[chosen], cache.labels[chosen]), zero_shot)
            optimizer.step()
            schedule.step()
        advance((1 - SEARCH_SHARE) * (epoch + 1) / FINE_TUNING_EPOCHS)


def _gradient(keys: _Keys, batch: Labelled, zero_shot: Classifier) -> Tensor:
    """Of the mean cross-entropy by the keys, (keys, dim); autograd would keep three more arrays of the pairs."""
    features, labels = batch.features, batch.labels
    powers = keys.closeness(features).mul_(BETA).exp_()
    errors = torch.add(_logits(features, zero_shot), keys.class_sums(powers), alpha=ALPHA).softmax(dim=1)
    errors.scatter_add_(1, labels[:, None], errors.new_full((1, 1), -1.0).expand(len(labels), 1))
    keys.by_layer(powers).mul_((errors * (ALPHA * BETA / len(labels)))[:, None])
    return powers.T @ features
