"""The `teacher` and `teacher_cache` sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from comkd_cli.recipe.architecture import Model
from comkd_cli.recipe.data import Data
from comkd_cli.recipe.fields import Closed, Count, Positive, Weight
from comkd_cli.recipe.optim import AdamW, Sgd

STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


class NoAdapt(Closed):
    """Keep the teacher as its weights are: zero-shot."""

    method: Literal["none"] = "none"
    """`none`"""


class FullAdapt(AdamW):
    """Train every weight of the teacher on the labelled images, by cross-entropy [C]."""

    method: Literal["full"] = "full"
    """`full`"""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of the teacher only, so that students of several seeds share one teacher."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes [C]."""


class Gaussian(Closed):
    """Average of the prompts over the epochs, weighted by a normal density over the epoch's number."""

    mean: Positive | None = None
    """The epoch with the largest weight. Default: three quarters of the epochs, 15 of 20 [S]."""
    deviation: Positive | None = None
    """In epochs. Default: a twentieth of the epochs, 1 of 20 [S]."""


class PromptSrcAdapt(Sgd):
    """PromptSRC: learned tokens in both frozen encoders, from a few labelled images of each class."""

    method: Literal["promptsrc"] = "promptsrc"
    """`promptsrc`"""
    data: Data | None = None
    """Labelled images to adapt on, if they are not the student's: cross-dataset and domain generalisation
    adapt on `{dataset: imagenet}`. Default: the recipe's own data."""
    classes: Literal["all", "base"] = "all"
    """`base` adapts on the first half of the classes only, for base-to-novel."""
    shots: Count | None = 16
    """Labelled images of each class, drawn with `seed`; null uses all [S]."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of the draw, the prompts and the order of the images; students of several seeds share one teacher."""
    tokens: Count = 4
    """Learned tokens at each prompted layer of either encoder [P]."""
    vision_depth: Count = 9
    """Prompted layers of the image encoder [P]."""
    text_depth: Count = 9
    """Prompted layers of the text encoder [P]."""
    text_weight: Weight = 25.0
    """Weight of the L1 distance between prompted and frozen text features [S]."""
    image_weight: Weight = 10.0
    """Weight of the L1 distance between prompted and frozen image features [S]."""
    logits_weight: Weight = 1.0
    """Weight of the KL divergence between frozen and prompted logits [S]."""
    gaussian: Gaussian | None = Gaussian()
    """Average of the prompts over the epochs; null keeps those of the last epoch [S]."""
    classes_at_once: Count = 64
    """Classes whose prompts are encoded at once; memory grows with this, not with the number of classes [C]."""


class LinearProbeAdapt(Closed):
    """Fit the class vectors of the frozen teacher to the labelled images, from its zero-shot vectors [C]."""

    method: Literal["linear_probe"] = "linear_probe"
    """`linear_probe`"""
    strengths: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] = STRENGTHS
    """Candidates for the weight of the squared distance to the zero-shot vectors; the best on the validation images is
    used, or the largest of several that are equally good [C]."""
    validation_percent: Annotated[float, Field(gt=0, lt=100)] = 20.0
    """Share of each class's labelled images that the strength is chosen on: at least one, and never all [C]."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of the draw of the validation images; students of several seeds share one teacher."""


Adapt = Annotated[
    NoAdapt | FullAdapt | PromptSrcAdapt | LinearProbeAdapt,
    Field(discriminator="method"),
    BeforeValidator(lambda value: {"method": value} if isinstance(value, str) else value),
]


class Teacher(Model):
    """The large CLIP that the student is distilled from."""

    adapt: Adapt = NoAdapt()
    """Stage 1: `none` keeps the zero-shot teacher, `linear_probe` fits its class vectors to the labelled images,
    `promptsrc` learns prompts from a few of them, `full` trains every weight on all of them."""
    format: Literal["clip", "promptsrc"] = "clip"
    """Format of the file in `weights`: `clip` is read by open_clip; `promptsrc` is a checkpoint with prompts, as
    PromptSRC and PromptKD publish their teachers. No code in the file is run."""
    backbone_weights: str | None = None
    """With `format: promptsrc`: the CLIP that the prompts were learned on (an open_clip tag or a file). It provides the
    table of word embeddings, which such checkpoints lack. Default: `openai`."""
    context: str | None = None
    """With `format: promptsrc`: the words that the learned text tokens started from, CTX_INIT of the run that wrote the
    file (the file does not record it). Words beyond the learned tokens are part of every class prompt. Default: `a
    photo of a` [S]."""

    @model_validator(mode="after")
    def _released(self) -> Teacher:
        if self.format == "promptsrc" and self.weights is None:
            raise ValueError("`format: promptsrc` needs `weights`: the checkpoint's file")
        if self.format == "promptsrc" and self.adapt.method != "none":
            raise ValueError("`format: promptsrc` is already adapted: use `adapt: none`")
        if self.format == "clip" and self.backbone_weights is not None:
            raise ValueError("`backbone_weights` needs `format: promptsrc`")
        if self.format == "clip" and self.context is not None:
            raise ValueError("`context` needs `format: promptsrc`")
        return self

    @model_validator(mode="after")
    def _is_trained(self) -> Teacher:
        if not self.has_weights and self.adapt.method in ("promptsrc", "linear_probe"):
            trained = "prompts" if self.adapt.method == "promptsrc" else "class vectors"
            raise ValueError(f"has random weights, and {self.adapt.method} trains only {trained}: set `weights`")
        if not self.has_weights and self.adapt.method == "none":
            raise ValueError("has random weights: set `weights`, or train it with `adapt: full`")
        if self.config is not None and "text_cfg" not in self.config:
            raise ValueError("`config` lacks text_cfg: a teacher encodes the class names")
        return self


class TeacherCacheSettings(Closed):
    """The teacher's image features of each crop, cached under RUNS/cache for all students, seeds and ablations."""

    views: Count = 20
    """Crops of an image: epoch e shows crop e mod views. With as many views as epochs, no crop repeats [C]."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of the crops, instead of the recipe's seed, so that students of several seeds share them [C]."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Data type of the cached features. With fp32, as many views as epochs and the recipe's seed, a run matches an
    uncached run [C]."""
