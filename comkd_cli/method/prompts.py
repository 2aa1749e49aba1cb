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

    Hooks on the transformer's own modules insert them, so that the forward pass stays open_clip's. depth_field: the
    recipe's, for errors. Raises ModelError for a transformer with fewer blocks than `depth`.
    """

    def __init__(self, depth: int, tokens: int, width: int, stack: nn.Module, blocks: Any, depth_field: str) -> None:
        super().__init__()
        if depth > len(blocks):
            raise ModelError(
                f"the transformer has {len(blocks)} blocks",
                field=depth_field,
                found=depth,
                allowed=f"at most {len(blocks)}",
            )
        self.tokens = nn.Parameter(torch.empty(depth, tokens, width).normal_(std=PROMPT_STD))
        self._bypassed = False
        # open_clip runs its blocks with tokens before batch unless they are batch-first.
        self._token_axis = 1 if getattr(stack, "batch_first", True) else 0
        for layer in range(1, depth):
            blocks[layer].register_forward_pre_hook(_Replace(self, layer), with_kwargs=True)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """A context in which the transformer runs without its prompts."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    @property
    def depth(self) -> int:
        """The number of layers with tokens of their own."""
        return self.tokens.shape[0]

    @property
    def count(self) -> int:
        """The number of tokens of each layer."""
        return self.tokens.shape[1]

    def _first_index(self, length: int) -> int:
        """The index of the first prompt among `length` tokens."""
        raise NotImplementedError

    def _insert(self, hidden: Tensor, layer: int, token_axis: int) -> Tensor:
        """The hidden states with a layer's own tokens at the prompts' indices."""
        axis, length = token_axis, hidden.shape[token_axis]
        first = self._first_index(length)
        before = hidden.narrow(axis, 0, first)
        after = hidden.narrow(axis, first + self.count, length - first - self.count)
        return torch.cat([before, self._expanded(layer, hidden, batch_axis=1 - axis), after], dim=axis)

    def _expanded(self, layer: int, like: Tensor, batch_axis: int) -> Tensor:
        prompts = self.tokens[layer].to(like.dtype).unsqueeze(batch_axis)
        shape = [-1, -1, -1]
        shape[batch_axis] = like.shape[batch_axis]
        return prompts.expand(shape)


class VisionPrompts(DeepPrompts):
    """A vision transformer with `tokens` learned tokens in each of its first `depth` layers.

    The first layer's tokens follow the patches, before the norm that precedes the blocks; each later prompted block
    replaces them by its own. They are removed before pooling, so that a tower that averages its tokens averages those
    of the image alone. With no tokens the features are exactly the tower's own.

    tower: an open_clip VisionTransformer, or its TimmModel around a timm VisionTransformer. depth_field: the
    recipe's, for errors. Raises ModelError for a tower without patch tokens or with fewer blocks than `depth`.
    """

    def __init__(self, tower: nn.Module, tokens: int, depth: int, depth_field: str = "student.prompts.depth") -> None:
        norm, stack, blocks = _vision_parts(tower, depth_field.rpartition(".")[0])
        super().__init__(depth, tokens, _vision_width(tower), stack, blocks, depth_field)
        self.tower = tower
        norm.register_forward_pre_hook(self._append)
        stack.register_forward_hook(self._strip)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, 3, size, size). Returns the tower's features, (batch, width)."""
        features: Tensor = self.tower(images)
        return features

    def _first_index(self, length: int) -> int:
        return length - self.count

    def _append(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the norm ahead of the blocks: (batch, patches, width) gains the first layer's tokens."""
        (embedded,) = args
        return args if self._bypassed else (torch.cat([embedded, self._expanded(0, embedded, batch_axis=0)], dim=1),)

    def _strip(self, _stack: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """After the blocks: remove the prompts."""
        return output if self._bypassed else output[:, : output.shape[1] - self.count]


class TextPrompts(DeepPrompts):
    """Learned tokens after the start token, in the first `depth` layers of a text transformer.

    Those of the first layer replace word embeddings before the positions are added, so that class prompts are tokenised
    with as many placeholder words; each later prompted block replaces them by its own.

    clip: an open_clip CLIP or CustomTextCLIP with a text transformer of its own, on which the hooks are registered.
    Raises ModelError for another model, or for one with fewer blocks than `depth`.
    """

    def __init__(self, clip: Any, tokens: int, depth: int) -> None:
        text = getattr(clip, "text", clip)
        if not hasattr(text, "token_embedding") or not hasattr(getattr(text, "transformer", None), "resblocks"):
            raise ModelError(
                "prompts need open_clip's own text transformer, but this text tower is a different one", field="teacher"
            )
        width = text.token_embedding.embedding_dim
        super().__init__(depth, tokens, width, text.transformer, text.transformer.resblocks, "teacher.adapt.text_depth")
        text.token_embedding.register_forward_hook(self._embed)

    def _first_index(self, _length: int) -> int:
        return 1

    def _embed(self, _embedding: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """After the word embeddings, (texts, context, width): insert the first layer's tokens."""
        return output if self._bypassed else self._insert(output, 0, token_axis=1)


class _Replace:
    """A hook before a block: replace the tokens of the layer before by the block's own."""

    def __init__(self, prompts: DeepPrompts, layer: int) -> None:
        self._prompts = prompts
        self._layer = layer

    def __call__(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prompts = self._prompts
        if prompts._bypassed:
            return args, kwargs
        return (prompts._insert(args[0], self._layer, prompts._token_axis), *args[1:]), kwargs


def _vision_parts(tower: nn.Module, field: str) -> tuple[nn.Module, nn.Module, nn.ModuleList | nn.Sequential]:
    """The norm before the blocks, the stack that runs them, and the blocks."""
    if hasattr(tower, "ln_pre") and hasattr(tower, "transformer"):
        transformer: Any = tower.transformer
        return tower.ln_pre, transformer, transformer.resblocks  # type: ignore[return-value]
    trunk: Any = getattr(tower, "trunk", None)
    if isinstance(getattr(trunk, "blocks", None), nn.Sequential) and hasattr(trunk, "norm_pre"):
        return trunk.norm_pre, trunk.blocks, trunk.blocks
    raise ModelError(
        "prompts need a vision transformer, but this image tower is not one",
        field=field,
        remedy="use `train: full` without prompts" if field.startswith("student") else None,
    )


def _vision_width(tower: nn.Module) -> int:
    embedding: Any = getattr(tower, "class_embedding", None)
    trunk: Any = getattr(tower, "trunk", None)
    return int(embedding.shape[-1]) if embedding is not None else int(trunk.embed_dim)
