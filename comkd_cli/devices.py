"""The device that accelerate would train on."""

from __future__ import annotations

import torch
from accelerate import PartialState


def best_device() -> torch.device:
    """CUDA, MPS or another accelerator where there is one, else the CPU; ACCELERATE_USE_CPU=1 forces it."""
    device: torch.device = PartialState().device
    return device
