"""Prompts of names with the teacher's vectors, and batches of them to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comkd_cli.data.batches import Batch
from comkd_cli.data.prompts import Prompts
from comkd_cli.data.transforms import stable_seed
from comkd_cli.edge.clip_tokenizer import END, START, Tokenizer

MOST_PROMPTS = 4  # of a name: of many templates a few, others for each name, so that all are learned
SPLIT = 0.1  # of the tokens, in training: so that the tokens of bytes and of parts of words are learned


def some_prompts(prompts: Prompts, name: str, most: int | None) -> list[str]:
    """The prompts of a name, at most `most`, chosen by the name alone. None: all."""
    texts = prompts.of(name)
    if most is None or len(texts) <= most:
        return list(texts)
    start = stable_seed("prompts", name) % len(texts)
    return [texts[(start + i * len(texts) // most) % len(texts)] for i in range(most)]


@dataclass(frozen=True)
class PromptSet:
    """Prompts of names."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    owners: np.ndarray
    """int64 (prompts,), ascending: the position of each prompt's name."""

    @classmethod
    def of(cls, names: Sequence[str], prompts: Prompts, most: int | None = MOST_PROMPTS) -> PromptSet:
        """The prompts of these names. most: of a name; None uses all."""
        texts = [some_prompts(prompts, name, most) for name in names]
        owners = np.repeat(np.arange(len(names)), [len(part) for part in texts])
        return cls(tuple(names), tuple(text for part in texts for text in part), owners)

    def name_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """The normalised mean of the vectors of each name's prompts, float32 (names, dim). vectors: (prompts, dim)."""
        starts = np.searchsorted(self.owners, np.arange(len(self.names)))
        sums = np.add.reduceat(vectors.astype(np.float32), starts)
        return np.asarray(sums / np.linalg.norm(sums, axis=1, keepdims=True))


class PromptLoader:
    """Batches of prompts and the teacher's vectors, in an order and with splits that depend on seed and epoch alone.

    prompts: (prompts,). vectors: float16 (prompts, dim). pruned: the small encoder's tokenizer. An incomplete last step
    is dropped, unless it is the only one.
    """

    def __init__(
        self, prompts: Sequence[str], vectors: np.ndarray, pruned: Tokenizer, batch_size: int, seed: int
    ) -> None:
        self.batch_size = min(batch_size, len(prompts))
        self.image_count = len(prompts)
        self.steps_per_epoch = len(prompts) // self.batch_size
        self._pruned, self._seed, self._vectors = pruned, seed, vectors
        self._texts = list(prompts)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """The steps of an epoch from a step on; both count from 0."""
        generator = torch.Generator().manual_seed(stable_seed("prompts", self._seed, epoch))
        order = torch.randperm(len(self._texts), generator=generator)
        for step in range(first_step, self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            random = np.random.default_rng(stable_seed("splits", self._seed, epoch, step))
            tokens = padded([self._tokens(self._texts[i], random) for i in chosen.tolist()], self._pruned)
            targets = torch.from_numpy(self._vectors[chosen.numpy()].astype(np.float32))
            yield (Batch(inputs=(tokens, targets), labels=None, indices=chosen),)

    def name_of(self, index: int) -> str:
        """The prompt at an index of `Batch.indices`."""
        return self._texts[index]

    def _tokens(self, text: str, random: np.random.Generator) -> list[int]:
        """The encoder's tokens of a prompt, some of them split."""
        return [known for token in self._pruned.clip_tokens(text) for known in self._split(token, random)]

    def _split(self, token: int, random: np.random.Generator) -> Iterator[int]:
        parts = self._pruned.split(token)
        if len(parts) == 1 or random.random() >= SPLIT:
            yield from self._pruned.known(token)
            return
        for part in parts:
            yield from self._split(part, random)


def padded(rows: Sequence[Sequence[int]], pruned: Tokenizer) -> Tensor:
    """Token ids int64 (rows, longest) with start and end, padded with zeros. rows: the encoder's tokens of texts."""
    (start,), (end,) = pruned.known(START), pruned.known(END)
    room = pruned.context_length - 2
    whole = [[start, *row[:room], end] for row in rows]
    tokens = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.int64)
    for target, row in zip(tokens, whole, strict=True):
        target[: len(row)] = torch.tensor(row)
    return tokens
