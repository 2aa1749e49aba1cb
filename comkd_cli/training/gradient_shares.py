"""How strongly each term of an objective pulls on the student, measured by gradients instead of by weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from comkd_cli.runtime import collectives


def gradient_shares(terms: dict[str, Tensor], projected: Tensor) -> dict[str, float]:
    """Each term's share of the summed gradient norms at the student's projected features; they sum to 1.

    terms: weighted scalars by name. projected: `StudentOutput.projected`, (batch, dim). The norm is L2, over the
    features of all processes; the graph is retained for the backward pass. Weights alone do not show this: at a weight
    of 1000, KL / (batch * classes) can pull less or far more than IFAlign at a weight of 1.
    """
    found = []
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, projected, retain_graph=True, allow_unused=True)
        found.append(projected.new_zeros(()) if gradient is None else gradient.square().sum())
    squares = dict(zip(terms, torch.stack(found).tolist(), strict=True))  # waits for a GPU once
    of_ranks = collectives.all_gather(squares)
    norms = {name: math.sqrt(sum(of_rank[name] for of_rank in of_ranks)) for name in squares}
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}
