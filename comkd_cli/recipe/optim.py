"""The `optim` section of a recipe, which training the teacher shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from comkd_cli.recipe.fields import BatchSize, Closed, Count, Positive, Weight


class _InParts(Closed):
    """A batch that may be divided into parts (gradient accumulation)."""

    batch_size: BatchSize = 8
    """Images per step, over all processes [K]."""
    accumulation_steps: Count = 1
    """Gradient accumulation: parts that a batch is divided into, to save memory. IFAlign's and BatchNorm's statistics
    are then computed over one part [C]."""

    clip_gradient_norm: Positive | None = None
    """Scale the gradient of a step down to this L2 norm if it is longer; null: do not clip [C]."""

    @model_validator(mode="after")
    def _parts_are_batches(self) -> _InParts:
        if self.batch_size < 2 * self.accumulation_steps:
            raise ValueError(
                f"{self.accumulation_steps} parts of a batch of {self.batch_size} have fewer than 2 images each; raise "
                "`batch_size`, or lower `accumulation_steps`"
            )
        return self


class Sgd(_InParts):
    """SGD with momentum, as PromptKD trains prompts."""

    name: Literal["sgd"] = "sgd"
    """`sgd`"""
    learning_rate: Positive = 0.005
    """At its peak, for this batch size; scale it linearly with the batch [K]."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """[K]"""
    weight_decay: Weight = 5e-4
    """[K]"""
    epochs: Count = 20
    """Passes over the training images [K]."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    """First epochs at `warmup_learning_rate`; then a cosine, stepped once per epoch [K]."""
    warmup_learning_rate: Positive = 1e-5
    """[K]"""


class AdamW(_InParts):
    """AdamW with a linear warm-up and a cosine to zero, both stepped at every batch [C]."""

    name: Literal["adamw"] = "adamw"
    """`adamw`"""
    learning_rate: Positive = 1e-3
    """At its peak [C]."""
    weight_decay: Weight = 0.05
    """Not applied to biases, norms, prompts and other vectors [C]."""
    batch_size: BatchSize = 128
    """Images per step, over all processes [C]."""
    epochs: Count = 20
    """Passes over the training images [C]."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs over which the rate rises from zero [C]."""


Optim = Annotated[
    Sgd | AdamW,
    Field(discriminator="name"),
    BeforeValidator(lambda value: {"name": "sgd", **value} if isinstance(value, dict) else value),
]
