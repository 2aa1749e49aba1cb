"""Logistic regression on a device, with scikit-learn's objective and steps: several C are fitted at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comkd_cli.evaluation.lbfgs import Stopping, minimise
from comkd_cli.method.linear_probe import Labelled

LOGITS_AT_ONCE, LOGITS_AT_ONCE_GPU = 1 << 19, 1 << 24  # of images x classes x fits: memory does not grow with these
WIDTH_UNIT = 8  # columns: matrix products are faster with whole vectors of numbers


class Regressions:
    """Logistic regressions of the same labelled images, one for each inverse regularisation C.

    Each minimises mean_i -log softmax(W f_i + b)[y_i] + |W|^2 / (2 C images) from zero. Of two classes, W and b are
    those of the second alone, and the logits of the first are 0. It is computed in float64, if the device has it:
    the ends of descents that are stopped early by scikit-learn's tolerance amplify rounding.
    """

    def __init__(self, train: Labelled) -> None:
        """train: of two classes or more."""
        self._classes, self._targets = torch.unique(train.labels, return_inverse=True)
        images, self._dim = train.features.shape
        width = -(-(self._dim + 1) // WIDTH_UNIT) * WIDTH_UNIT
        device = train.features.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._inputs = torch.zeros(images, width, dtype=dtype, device=device)  # features, 1 for b, zeros
        self._inputs[:, : self._dim] = train.features
        self._inputs[:, self._dim] = 1
        self._binary = len(self._classes) == 2
        self._rows = 1 if self._binary else len(self._classes)
        self._at_once = LOGITS_AT_ONCE if device.type == "cpu" else LOGITS_AT_ONCE_GPU

    def fit(self, cs: Sequence[float], stopping: Stopping | None = None) -> list[Tensor]:
        """The weights for each C, (classes, dim + 1), b last; of two classes one row."""
        width = self._inputs.shape[1]
        strengths = self._inputs.new_tensor([1 / (c * len(self._inputs)) for c in cs])

        def evaluate(points: Tensor, positions: Sequence[int]) -> tuple[list[float], Tensor]:
            return self._loss(points.view(len(points), self._rows, width), strengths[list(positions)])

        descents = minimise(evaluate, self._inputs.new_zeros(len(cs), self._rows * width), stopping)
        return [descent.trial.view(self._rows, width)[:, : self._dim + 1] for descent in descents]

    def predict(self, weights: Tensor, features: Tensor) -> Tensor:
        """The classes of features, (images, dim), by weights of `fit`, (images,) int64."""
        parts = []
        for part in torch.split(features, max(1, self._at_once // len(self._classes))):
            logits = part.to(weights.dtype) @ weights[:, :-1].T + weights[:, -1]
            parts.append((logits[:, 0] > 0).long() if self._binary else logits.argmax(dim=1))
        predicted: Tensor = self._classes[torch.cat(parts)]
        return predicted

    def _loss(self, weights: Tensor, strengths: Tensor) -> tuple[list[float], Tensor]:
        """The objective of each fit, and its gradient, (fits, rows x width). weights: (fits, rows, width)."""
        fits, _, width = weights.shape
        stacked = weights.view(-1, width)
        sums, gradient = weights.new_zeros(fits), torch.zeros_like(stacked)
        size = max(1, self._at_once // len(stacked))
        for inputs, targets in zip(torch.split(self._inputs, size), torch.split(self._targets, size), strict=True):
            logits = (stacked @ inputs.T).view(fits, self._rows, len(inputs))
            part, errors = _cross_entropy(_with_zeros(logits) if self._binary else logits, targets)
            sums += part
            gradient.addmm_(errors[:, -self._rows :].reshape(-1, len(inputs)), inputs)
        penalised = weights.clone()
        penalised[:, :, self._dim] = 0
        values = sums / len(self._inputs) + penalised.square().sum(dim=(1, 2)) * strengths / 2
        gradients = gradient.view_as(weights) / len(self._inputs) + strengths[:, None, None] * penalised
        return values.tolist(), gradients.view(fits, -1)


def _with_zeros(logits: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the images' cross-entropies, (fits,), and its gradient by the logits, (fits, classes, images).

    logits: (fits, classes, images), overwritten. targets: (images,).
    """
    picked = targets.expand(len(logits), 1, -1)
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    sums = (normaliser - logits.gather(1, picked)).sum(dim=(1, 2))
    errors = logits.sub_(normaliser).exp_()
    errors.scatter_add_(1, picked, errors.new_full((1, 1, 1), -1.0).expand(picked.shape))
    return sums, errors
