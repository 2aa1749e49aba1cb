"""The kinds of hostile inputs, and how often each occurs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from pathlib import Path

from benchmarks.hostile import archives, bundle, documents, pickles, pictures

Kind = Callable[[random.Random, Path], None]
"""Makes an input in an empty folder by a generator of random numbers, and calls the readers on it."""

KINDS: dict[str, tuple[Kind, int]] = {
    "recipe": (documents.recipe, 2),
    "setting": (documents.setting, 3),
    "split": (documents.split, 3),
    "class_list": (documents.class_list, 2),
    "labels": (documents.labels, 2),
    "prompts": (documents.prompts, 1),
    "results": (documents.results, 1),
    "curve": (documents.curve, 1),
    "image": (pictures.image, 12),
    "student": (pickles.student, 3),
    "teacher": (pickles.teacher, 2),
    "promptsrc": (pickles.promptsrc, 2),
    "weights": (pickles.weights, 2),
    "archive": (archives.archive, 3),
    "shard": (archives.shard, 2),
    "bundle": (bundle.bundle, 3),
    "graph": (bundle.graph, 2),
}
"""With the number of them in a cycle of inputs: the slow ones are rarer."""


def cycle(names: Sequence[str]) -> list[str]:
    """The kinds of consecutive inputs, mixed, after which they repeat."""
    found = list(chain.from_iterable(repeat(name, KINDS[name][1]) for name in names))
    random.Random(0).shuffle(found)
    return found


def prepare(names: Sequence[str]) -> None:
    """Make what the inputs of these kinds are made of, before the processes that try them are forked."""
    if "image" in names:
        pictures.wholes()
    if not {"student", "teacher", "promptsrc", "weights"}.isdisjoint(names):
        pickles.wholes()


def generator(seed: int, name: str, number: int) -> random.Random:
    """The random numbers of one input, which these three determine."""
    return random.Random(f"{seed}/{name}/{number}")
