"""Optimizers with the parameter groups of PromptKD (SGD) and of CLIP's training (AdamW)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from comkd_cli.recipe.model import AdamW, Sgd

FUSED_ON = {"cpu", "cuda"}


def make_optimizer(model: nn.Module, optim: Sgd | AdamW, rate_factors: Mapping[str, float]) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters, in groups that differ in weight decay or learning rate.

    SGD decays every parameter, as PromptKD does; AdamW does not decay vectors and scalars (biases, norms,
    gates) and prompts. rate_factors: see `Task.rate_factors`; a group holds its factor as `rate_factor`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = isinstance(optim, AdamW) and (parameter.ndim < 2 or name.endswith(".tokens"))
            decay = 0.0 if exempt else optim.weight_decay
            groups.setdefault((decay, rate_factors.get(name, 1.0)), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]
    if isinstance(optim, Sgd):
        return torch.optim.SGD(settings, lr=optim.learning_rate, momentum=optim.momentum)
    devices = {parameter.device.type for parameters in groups.values() for parameter in parameters}
    # Reads and writes each tensor once, which on a CPU takes a quarter of the time of PyTorch's own choice.
    return torch.optim.AdamW(settings, lr=optim.learning_rate, fused=devices <= FUSED_ON or None)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of the same optimizer from a machine that may have had another device.

    How a step is computed (`fused`) is that of this machine's optimizer; the state would overwrite it. Moments get the
    memory layout of their parameter: the fused step of a CPU goes through both in the order of memory.
    """
    own = [group.get("fused") for group in optimizer.param_groups]
    groups = [
        {**group, "fused": fused} if "fused" in group else group
        for group, fused in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
