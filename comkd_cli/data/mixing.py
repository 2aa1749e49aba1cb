"""Mixed crops: mixup and CutMix of two images, each a pure function of (seed, image, view).

torchvision's and timm's versions mix an image with another image of its batch. Here the seed chooses the partner, so
that a mixed crop does not depend on the batch, and the teacher's features of it can be cached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from comkd_cli.recipe.model import Mix


@dataclass(frozen=True)
class Mixture:
    """How a crop is mixed with the crop of another image."""

    partner: int
    """The other image's position in its set."""
    share: float
    """Of the other crop, 0 to 1, by weight (mixup) or by area before the rectangle is clipped (CutMix)."""
    centre: tuple[float, float] | None
    """Of CutMix's rectangle, as shares of height and width; None for mixup."""

    def of(self, inputs: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """The mixed crops. inputs, others: float32 (3, size, size) for each model; models may share a tensor.

        The rectangle is the same part of the image at every input size, up to rounding to pixels.
        """
        mixed: dict[int, Tensor] = {}
        for tensor, other in zip(inputs, others, strict=True):
            if id(tensor) not in mixed:
                mixed[id(tensor)] = self._of_one(tensor, other)
        return [mixed[id(tensor)] for tensor in inputs]

    def _of_one(self, tensor: Tensor, other: Tensor) -> Tensor:
        if self.centre is None:
            return tensor.lerp(other, self.share)
        rows, columns = (
            _span(centre, self.share, length) for centre, length in zip(self.centre, tensor.shape[-2:], strict=True)
        )
        mixed = tensor.clone()
        mixed[..., rows, columns] = other[..., rows, columns]
        return mixed


def draw_mixture(settings: Mix, seed: int, images: int) -> Mixture | None:
    """Draw whether and how a crop is mixed; None: not mixed. images: of the set, among which the partner is."""
    random = np.random.default_rng(seed)
    if random.random() >= settings.probability:
        return None
    share = float(random.beta(settings.alpha, settings.alpha))
    partner = int(random.integers(images))
    centre = (float(random.random()), float(random.random())) if settings.kind == "cutmix" else None
    return Mixture(partner, share, centre)


def _span(centre: float, area: float, length: int) -> slice:
    """The pixels along one side of a rectangle that has this share of the area and the image's aspect ratio.

    As in CutMix, a rectangle that reaches over the edge is clipped.
    """
    side = math.sqrt(area)
    first, last = (round(length * (centre + half * side)) for half in (-0.5, 0.5))
    return slice(max(0, first), min(length, last))
