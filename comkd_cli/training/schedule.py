"""Learning rates: plain arithmetic on epochs and steps."""

from __future__ import annotations

import math

from comkd_cli.recipe.model import AdamW, Sgd


def learning_rate(optim: Sgd | AdamW, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step; epoch and step count from 0.

    SGD: `warmup_learning_rate` in the warm-up epochs, then with E epochs and w of warm-up
    lr / 2 * (1 + cos(pi * (e - w) / E)), once an epoch (constant warm-up of Dassl, optim/lr_scheduler.py,
    as PromptKD uses it; the cosine is not stretched to end at zero).

    AdamW: a line from zero over the warm-up, then a cosine that ends at zero, both at every step.
    """
    if isinstance(optim, Sgd):
        if epoch < optim.warmup_epochs:
            return optim.warmup_learning_rate
        turn = math.pi * (epoch - optim.warmup_epochs) / optim.epochs
        return optim.learning_rate / 2 * (1 + math.cos(turn))
    position = epoch * steps_per_epoch + step
    warmup = min(optim.warmup_epochs, optim.epochs) * steps_per_epoch
    if position < warmup:
        return optim.learning_rate * (position + 1) / warmup
    remaining = optim.epochs * steps_per_epoch - warmup
    return optim.learning_rate / 2 * (1 + math.cos(math.pi * (position - warmup) / remaining))
