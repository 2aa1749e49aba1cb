"""Deep prompts: learned tokens in the layers of a frozen transformer (IVLP, arXiv 2307.06948)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from comkd_cli.errors import ModelError

PROMPT_STD = 0.02  # of the normal distribution that prompts are drawn from, as PromptSRC draws them


class DeepPrompts(nn.Module):
    """Learned tokens for the first `depth` layers of a transformer: `tokens`, (depth, tokens, width).

    They are put in by hooks on the transformer's own modules, whose forward pass stays open_clip's.
    """

    def __init__(self, depth: int, tokens: int, width: int, stack: nn.Module, blocks: Any, which: str) -> None:
        super().__init__()
        if depth > len(blocks):
            raise ModelError(f"{which}: {depth} is more than the {len(blocks)} blocks of the transformer")
        self.tokens = nn.Parameter(torch.empty(depth, tokens, width).normal_(std=PROMPT_STD))
        self._bypassed = False
        # open_clip runs its blocks with tokens before batch unless they are batch-first.
        self._token_axis = 1 if getattr(stack, "batch_first", True) else 0
        for layer in range(1, depth):
            blocks[layer].register_forward_pre_hook(_Replace(self, layer), with_kwargs=True)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, the transformer is the frozen one, as if it had no prompts."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    @property
    def depth(self) -> int:
        """Layers that have tokens of their own."""
        return self.tokens.shape[0]

    @property
    def count(self) -> int:
        """Tokens a layer."""
        return self.tokens.shape[1]

    def _place(self, length: int) -> int:
        """Where the prompts start among `length` tokens."""
        raise NotImplementedError

    def _put(self, hidden: Tensor, layer: int, token_axis: int) -> Tensor:
        """The hidden states with a layer's own tokens in the prompts' places."""
        axis, length = token_axis, hidden.shape[token_axis]
        place = self._place(length)
        before = hidden.narrow(axis, 0, place)
        after = hidden.narrow(axis, place + self.count, length - place - self.count)
        return torch.cat([before, self._expanded(layer, hidden, batch_axis=1 - axis), after], dim=axis)

    def _expanded(self, layer: int, like: Tensor, batch_axis: int) -> Tensor:
        prompts = self.tokens[layer].to(like.dtype).unsqueeze(batch_axis)
        shape = [-1, -1, -1]
        shape[batch_axis] = like.shape[batch_axis]
        return prompts.expand(shape)


class VisionPrompts(DeepPrompts):
    """A vision transformer with `tokens` learned tokens in each of its first `depth` layers.

    The first layer's tokens stand after the patches, before the norm that precedes the blocks; every
    later prompted block finds that layer's own tokens in their places. They are taken away before
    pooling, so a tower that averages its tokens averages the picture's alone. With no tokens the
    features are exactly the tower's own.

    tower: an open_clip VisionTransformer, or its TimmModel around a timm VisionTransformer. which: the
    field that a message names. Raises ModelError for a tower without patch tokens or with fewer blocks
    than `depth`.
    """

    def __init__(self, tower: nn.Module, tokens: int, depth: int, which: str = "student.prompts") -> None:
        norm, stack, blocks = _vision_parts(tower, which)
        super().__init__(depth, tokens, _vision_width(tower), stack, blocks, f"{which}.depth")
        self.tower = tower
        norm.register_forward_pre_hook(self._append)
        stack.register_forward_hook(self._strip)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, 3, size, size). Returns the tower's features, (batch, width)."""
        features: Tensor = self.tower(images)
        return features

    def _place(self, length: int) -> int:
        return length - self.count

    def _append(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the norm ahead of the blocks: (batch, patches, width) gains the first layer's tokens."""
        (embedded,) = args
        return args if self._bypassed else (torch.cat([embedded, self._expanded(0, embedded, batch_axis=0)], dim=1),)

    def _strip(self, _stack: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """After the blocks: the prompts' places go."""
        return output if self._bypassed else output[:, : output.shape[1] - self.count]


class TextPrompts(DeepPrompts):
    """Learned tokens in the places after the start token, in the first `depth` layers of a text transformer.

    The first layer's take the places of word embeddings, before the positions are added, so prompts are
    tokenised with as many placeholder words; each later prompted block finds its own tokens there.

    clip: an open_clip CLIP or CustomTextCLIP with a transformer of its own for texts; it gets the hooks.
    Raises ModelError for another, or for one with fewer blocks than `depth`.
    """

    def __init__(self, clip: Any, tokens: int, depth: int, which: str = "teacher.adapt.text_depth") -> None:
        text = getattr(clip, "text", clip)
        if not hasattr(text, "token_embedding") or not hasattr(getattr(text, "transformer", None), "resblocks"):
            raise ModelError(
                "teacher: this text tower is not open_clip's own transformer, which prompts can be put into"
            )
        width = text.token_embedding.embedding_dim
        super().__init__(depth, tokens, width, text.transformer, text.transformer.resblocks, which)
        text.token_embedding.register_forward_hook(self._embed)

    def _place(self, _length: int) -> int:
        return 1

    def _embed(self, _embedding: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """(texts, context, width): word embeddings, with the first layer's tokens in their places."""
        return output if self._bypassed else self._put(output, 0, token_axis=1)


class _Replace:
    """Before a block: its own tokens take the places of the layer before's."""

    def __init__(self, prompts: DeepPrompts, layer: int) -> None:
        self._prompts = prompts
        self._layer = layer

    def __call__(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prompts = self._prompts
        if prompts._bypassed:
            return args, kwargs
        return (prompts._put(args[0], self._layer, prompts._token_axis), *args[1:]), kwargs


def _vision_parts(tower: nn.Module, which: str) -> tuple[nn.Module, nn.Module, nn.ModuleList | nn.Sequential]:
    """The norm before the blocks, the stack that runs them, and the blocks."""
    if hasattr(tower, "ln_pre") and hasattr(tower, "transformer"):
        transformer: Any = tower.transformer
        return tower.ln_pre, transformer, transformer.resblocks  # type: ignore[return-value]
    trunk: Any = getattr(tower, "trunk", None)
    if isinstance(getattr(trunk, "blocks", None), nn.Sequential) and hasattr(trunk, "norm_pre"):
        return trunk.norm_pre, trunk.blocks, trunk.blocks
    instead = "; use `train: full` without prompts" if which.startswith("student") else ""
    raise ModelError(f"{which}: this image tower is no vision transformer that prompts can be put into{instead}")


def _vision_width(tower: nn.Module) -> int:
    embedding: Any = getattr(tower, "class_embedding", None)
    trunk: Any = getattr(tower, "trunk", None)
    return int(embedding.shape[-1]) if embedding is not None else int(trunk.embed_dim)
