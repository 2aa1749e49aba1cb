"""`adapt: linear_probe`: a head on frozen image features, regularised towards the zero-shot class vectors."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MOST_ITERATIONS = 1000
GRADIENT_TOLERANCE, CHANGE_TOLERANCE = 1e-7, 1e-12


@dataclass(frozen=True)
class Labelled:
    """Image features and their classes."""

    features: Tensor
    """(images, dim), L2-normalised."""
    labels: Tensor
    """(images,) int64."""

    def subset(self, indices: Sequence[int]) -> Labelled:
        """The images at these positions."""
        return Labelled(self.features[list(indices)], self.labels[list(indices)])


@dataclass(frozen=True)
class Classifier:
    """Logits scale * features @ vectors.T."""

    vectors: Tensor
    """(classes, dim), L2-normalised."""
    scale: Tensor
    """Scalar."""

    def top1_percent(self, images: Labelled) -> float:
        """The share of images whose class it predicts, in percent."""
        predicted = (images.features @ self.vectors.T).argmax(dim=1)
        return 100 * float((predicted == images.labels).double().mean())


@dataclass(frozen=True)
class Probe:
    """The class vectors of a fitted teacher, and how they were chosen."""

    classifier: Classifier
    """The head, or the zero-shot classifier if the head is not better."""
    strength: float
    """Of the head that is best on the validation images."""
    validation_images: int
    zero_shot_top1_percent: float
    """On the validation images."""
    top1_percent: float
    """On the validation images, of the best head of the other labelled images."""

    @property
    def improves(self) -> bool:
        """Whether the head is better than the zero-shot classifier on the validation images."""
        return self.top1_percent > self.zero_shot_top1_percent


def fit_probe(
    images: Labelled, zero_shot: Classifier, strengths: Sequence[float], validation_percent: float, seed: int
) -> Probe:
    """Fit a head to labelled images with the strength that is best on a validation share of them.

    The share is stratified (`validation_split`). Each strength's head is fitted to the other images and scored as the
    unit vectors that it would become. Of equally good strengths the largest is chosen, and its head is fitted to all
    labelled images. If it does not beat the zero-shot classifier, that one is kept. Raises ValueError if no class
    has two images.
    """
    train, validation = (
        images.subset(part) for part in validation_split(images.labels.tolist(), validation_percent, seed)
    )
    if not len(validation.labels):
        raise ValueError("no class has two labelled images, so none can be held out")
    before = zero_shot.top1_percent(validation)
    scores = {
        strength: unit_rows(fit_head(train, zero_shot, strength)).top1_percent(validation)
        for strength in sorted(strengths, reverse=True)
    }
    strength = max(scores, key=lambda candidate: scores[candidate])
    better = scores[strength] > before
    classifier = unit_rows(fit_head(images, zero_shot, strength)) if better else zero_shot
    return Probe(classifier, strength, len(validation.labels), before, scores[strength])


def fit_head(images: Labelled, zero_shot: Classifier, strength: float) -> Tensor:
    """The rows V of the head with logits features @ V.T, (classes, dim) float64.

    V minimises mean_i -log softmax(V f_i)[y_i] + strength / 2 * mean_c ||v_c - s w_c||^2 from V = s W, s and W being
    the zero-shot scale and vectors and c the classes that have images; the rows of other classes stay s w_c. The
    objective is convex with one optimum. L-BFGS with a strong Wolfe line search, in float64. After Silva-Rodriguez et
    al., "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models" (arXiv 2312.12730), who constrain a
    probe to the zero-shot prototypes.
    """
    features, labels = images.features.double(), images.labels
    start = zero_shot.scale.double() * zero_shot.vectors.double()
    classes = torch.unique(labels)
    change = torch.zeros(len(classes), start.shape[1], dtype=torch.float64, device=start.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=CHANGE_TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(features @ start.index_add(0, classes, change).T, labels)
        loss = loss + strength / 2 * change.square().sum(dim=1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return start.index_add(0, classes, change.detach())


def unit_rows(head: Tensor) -> Classifier:
    """The classifier of unit vectors whose logits are closest to the head's.

    head: (classes, dim). The vectors are its rows divided by their lengths, and the scale is the mean length, which
    minimises sum_c ||v_c - scale * v_c / |v_c| ||^2. If all rows have one length, the logits are equal.
    """
    lengths = head.norm(dim=1)
    return Classifier((head / lengths[:, None]).float(), lengths.mean().float())


def validation_split(labels: Sequence[int], percent: float, seed: int) -> tuple[list[int], list[int]]:
    """The positions of the images to fit and of those to validate on, both in increasing order.

    Of each class with two images or more, `percent` are drawn for validation: at least one, and never all.
    """
    positions: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        positions[label].append(position)
    stream = random.Random(seed)
    held_out: set[int] = set()
    for label in sorted(positions):
        count = len(positions[label])
        held_out.update(stream.sample(positions[label], min(count - 1, max(1, round(count * percent / 100)))))
    return [position for position in range(len(labels)) if position not in held_out], sorted(held_out)
