"""The cost of a model: its parameters, and its multiply-adds for one image."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from comkd_cli.runtime.imports import without_compiler

Tower = tuple[nn.Module, int]
"""A module and the side of its square images, in pixels."""


def parameters(module: nn.Module) -> int:
    """The number of parameters, trainable or not; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def text_parameters(clip: nn.Module) -> int:
    """The number of parameters of an open_clip model without its image tower, its logit scale and its logit bias."""
    image = ("visual.", "logit_scale", "logit_bias")
    return sum(parameter.numel() for name, parameter in clip.named_parameters() if not name.startswith(image))


@without_compiler()
def multiply_adds(module: nn.Module, size: int) -> int:
    """Multiply-adds of the matrix products, convolutions and attention for one image of `size` by `size` pixels.

    Half of the floating point operations that torch counts. Counted on the meta device, where nothing is computed and
    attention is counted independently of the kernel that the module's own device would use.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, for a fifth of a second

    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    outline = {name: tensor.to("meta") for name, tensor in tensors.items()}
    was_training = module.training
    module.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        functional_call(module, outline, (torch.zeros(1, 3, size, size),))
    module.train(was_training)
    return int(counter.get_total_flops()) // 2


def step_multiply_adds(batch_size: int, trained: Tower, frozen: Tower | None = None, text: int = 0) -> int | None:
    """Multiply-adds of a training step, roughly: forward and backward cost three times a forward pass.

    trained, frozen: the image towers that see each image of the batch. text: multiply-adds of a forward pass through
    the text tower, for the prompts of all classes. None if the meta device cannot compute a tower.
    """
    try:
        images = 3 * multiply_adds(*trained) + (0 if frozen is None else multiply_adds(*frozen))
    except (RuntimeError, NotImplementedError):  # some timm towers compute what the meta device cannot
        return None
    return batch_size * images + 3 * text


def text_multiply_adds(clip: nn.Module, tokens: int) -> int:
    """Multiply-adds of the weights of an open_clip model's text tower, for this total number of prompt tokens."""
    weights = {
        name: parameter.numel()
        for name, parameter in clip.named_parameters()
        if not name.startswith("visual.") and "embedding" not in name
    }
    return tokens * sum(weights.values())
