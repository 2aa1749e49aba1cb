"""Tensors of the transformers library under other names: its attention has queries, keys and values apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BUFFERS = ("embeddings.position_ids",)
PROJECTION = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a tower are in the other model."""

    prefix: str
    """What precedes the number of a block."""
    names: Mapping[str, str]
    """Of the modules in a block."""
    attention: str
    """What precedes `weight` or `bias` of queries, keys and values, in one tensor."""


@dataclass(frozen=True)
class Layout:
    """The names of one model of transformers in another model."""

    plain: Mapping[str, str]
    """Of tensors, or of the modules that they belong to."""
    blocks: Mapping[str, Blocks]
    """By the prefix of the blocks in transformers."""

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in the other model; those that the layout does not have keep their names."""
        renamed: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.endswith(BUFFERS):
                continue
            blocks, number, rest = self._split(name)
            if blocks is None:
                renamed[_renamed(name, self.plain)] = value
            elif found := PROJECTION.fullmatch(rest):
                parts.setdefault(f"{blocks.prefix}{number}.{blocks.attention}{found[2]}", {})[found[1]] = value
            else:
                renamed[f"{blocks.prefix}{number}.{_renamed(rest, blocks.names)}"] = value
        for name, of in parts.items():
            renamed[name] = torch.cat([of[which] for which in "qkv" if which in of])
        return renamed

    def _split(self, name: str) -> tuple[Blocks | None, str, str]:
        """The blocks that a tensor belongs to, the number of its block, and its name in there; None outside of them."""
        for prefix, blocks in self.blocks.items():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                return blocks, number, rest
        return None, "", name


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name, if `names` has it, or the module that it belongs to."""
    module, _, kind = name.rpartition(".")
    return names.get(name) or (f"{names[module]}.{kind}" if module in names else name)
