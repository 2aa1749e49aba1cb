"""Deep vision prompts: learned tokens beside the patches of a vision transformer (IVLP, arXiv 2307.06948)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comkd_cli.errors import ModelError

PROMPT_STD = 0.02  # of the normal distribution that prompts are drawn from, as PromptSRC draws them


class VisionPrompts(nn.Module):
    """A vision transformer with `tokens` learned tokens in each of its first `depth` layers.

    The first layer's tokens stand after the patches, before the norm that precedes the blocks; every
    later prompted block finds that layer's own tokens in their places. They are taken away before
    pooling, so a tower that averages its tokens averages the picture's alone. With no tokens the
    features are exactly the tower's own.

    tower: an open_clip VisionTransformer, or its TimmModel around a timm VisionTransformer. The tokens
    are put in by hooks on the tower's own modules: its forward pass stays open_clip's. Raises ModelError
    for a tower without patch tokens or with fewer blocks than `depth`.
    """

    def __init__(self, tower: nn.Module, tokens: int, depth: int) -> None:
        super().__init__()
        self.tower = tower
        norm, stack, blocks = _parts(tower)
        if depth > len(blocks):
            raise ModelError(f"student.prompts.depth: {depth} is more than the backbone's {len(blocks)} blocks")
        self.tokens = nn.Parameter(torch.empty(depth, tokens, _width(tower)).normal_(std=PROMPT_STD))
        # open_clip runs its blocks with tokens before batch unless they are batch-first.
        self._token_axis = 1 if getattr(stack, "batch_first", True) else 0
        norm.register_forward_pre_hook(self._append)
        for layer in range(1, depth):
            blocks[layer].register_forward_pre_hook(_Replace(self, layer), with_kwargs=True)
        stack.register_forward_hook(self._strip)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, 3, size, size). Returns the tower's features, (batch, width)."""
        features: Tensor = self.tower(images)
        return features

    def _append(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the norm ahead of the blocks: (batch, patches, width) gains the first layer's tokens."""
        (embedded,) = args
        return (torch.cat([embedded, self._expanded(0, embedded, batch_axis=0)], dim=1),)

    def _strip(self, _stack: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """After the blocks: the prompts' places go."""
        return output[:, : output.shape[1] - self.tokens.shape[1]]

    def _expanded(self, layer: int, like: Tensor, batch_axis: int) -> Tensor:
        prompts = self.tokens[layer].to(like.dtype).unsqueeze(batch_axis)
        shape = [-1, -1, -1]
        shape[batch_axis] = like.shape[batch_axis]
        return prompts.expand(shape)


class _Replace:
    """Before a block: its own tokens take the places of the layer before's."""

    def __init__(self, prompts: VisionPrompts, layer: int) -> None:
        self._prompts = prompts
        self._layer = layer

    def __call__(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0]
        axis = self._prompts._token_axis
        kept = hidden.narrow(axis, 0, hidden.shape[axis] - self._prompts.tokens.shape[1])
        own = self._prompts._expanded(self._layer, hidden, batch_axis=1 - axis)
        return (torch.cat([kept, own], dim=axis), *args[1:]), kwargs


def _parts(tower: nn.Module) -> tuple[nn.Module, nn.Module, nn.ModuleList | nn.Sequential]:
    """The norm before the blocks, the stack that runs them, and the blocks."""
    if hasattr(tower, "ln_pre") and hasattr(tower, "transformer"):
        transformer: Any = tower.transformer
        return tower.ln_pre, transformer, transformer.resblocks  # type: ignore[return-value]
    trunk: Any = getattr(tower, "trunk", None)
    if isinstance(getattr(trunk, "blocks", None), nn.Sequential) and hasattr(trunk, "norm_pre"):
        return trunk.norm_pre, trunk.blocks, trunk.blocks
    raise ModelError(
        "student.prompts: this backbone is no vision transformer that prompts can be put into; "
        "use `train: full` without prompts"
    )


def _width(tower: nn.Module) -> int:
    embedding: Any = getattr(tower, "class_embedding", None)
    trunk: Any = getattr(tower, "trunk", None)
    return int(embedding.shape[-1]) if embedding is not None else int(trunk.embed_dim)
