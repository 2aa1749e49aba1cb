"""What a recipe may say. Every field's docstring is its documentation: docs/recipes.md is made from them.

Defaults marked [K] are PromptKD's, [S] PromptSRC's, [P] the ComKD-CLIP paper's, [C] this project's choice
where those are silent.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from comkd_cli.recipe.catalog import CATALOG

DATASETS = ("digits", *CATALOG)
DEFAULT_TEMPLATE = "a photo of a {}."
# open_clip names that start so bring their own weights.
SCHEMES = ("hf-hub:", "local-dir:")
SCHEMA_VERSION: Literal[1] = 1
MINUTES_A_WEEK = 7 * 24 * 60

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=2)]
"""One image has no batch statistics: neither IFAlign nor BatchNorm can train on it."""


def _only_json(config: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"should hold numbers, words, lists and mappings alone: {error}") from error
    return config


class Closed(BaseModel):
    """Refuses unknown fields, is never changed once read, and converts nothing silently."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class Data(Closed):
    """The images to learn from and the classes to tell apart: a named `dataset`, a `folder`, or
    `shards`."""

    dataset: str | None = None
    """A data set that comkd knows: one of the suite (`comkd datasets list`), below the data root; or
    `digits`, which ships with scikit-learn: 1,797 handwritten digits, 8 by 8."""
    folder: str | None = None
    """A folder of images: unlabelled anywhere below it, or train/, val/ and test/ with a sub-folder a class.
    A relative path is looked for in the current directory, then under the data root."""
    shards: str | None = None
    """WebDataset shards, tar files of unlabelled images too many to be files: a path or address, braces standing
    for many, such as `"train-{0000..0099}.tar"` (in quotes). A relative path is looked for as a `folder` is;
    `http:`, `pipe:` and what else webdataset opens is fetched once, under RUNS/shards. Needs `classes`."""
    classes: str | Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Class names in the order of the labels: a text file with one a line, or a list. Left out, the sub-folder names
    are taken, sorted. Underscores are spaces, wherever names come from."""
    template: str | None = None
    """The prompt of a class, `{}` standing for its name. Left out: the dataset's own, or `a photo of a {}.`"""
    unreadable_limit_percent: Annotated[float, Field(ge=0, le=100)] = 10.0
    """The share of images that may be unreadable; they are named and left out. Above it a run stops."""
    fingerprint: Literal["contents", "size_and_time"] = "contents"
    """How a run, a teacher, a cache and kept features tell their images from others of the same names. `contents` reads
    every file once and remembers its sha256 in RUNS/image_digests.sqlite as long as its path, size and times stay.
    `size_and_time` reads no file, for sets so large that reading them once takes too long: a file that was replaced
    by another of the same size and modification time is then not noticed [C]."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images, for each process that trains. Left out: one less than the cores that it has, at
    most 8; none for `digits`."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if [self.dataset, self.folder, self.shards].count(None) != 2:
            raise ValueError("needs exactly one of `dataset`, `folder` and `shards`")
        if self.dataset is not None and self.dataset not in DATASETS:
            close = difflib.get_close_matches(self.dataset, DATASETS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"comkd knows {', '.join(DATASETS)}"
            raise ValueError(f"{self.dataset!r} is no data set that comkd knows; {hint}")
        if self.dataset is not None and self.classes is not None:
            raise ValueError(f"`classes` belongs to `folder` and `shards`; the dataset {self.dataset} brings its own")
        if self.shards is not None and self.classes is None:
            raise ValueError("`shards` have no labels: give `classes`, a list or a text file with a name a line")
        if self.template is not None and self.template.count("{}") != 1:
            raise ValueError(f"`template` must hold {{}} once, for the class name; it is {self.template!r}")
        return self


class Augment(Closed):
    """Random resized crop and flip; teacher and student always see the same crop."""

    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """The least share of the picture's area that a crop keeps; the most is all of it [K]."""
    flip: bool = True
    """Mirror half of the crops. Switch it off where left and right differ, as in text or digits [K]."""


class NoAdapt(Closed):
    """Keep the teacher as its weights are: zero-shot."""

    method: Literal["none"] = "none"
    """`none`"""


class _InParts(Closed):
    """A batch that may go through the model in parts."""

    batch_size: BatchSize = 8
    """Images a step, over all processes [K]."""
    accumulation_steps: Count = 1
    """Parts that a batch goes through the model in, one after another, to save memory. What is taken over a batch,
    IFAlign's and BatchNorm's statistics, is then taken over a part [C]."""

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
    """First epochs at `warmup_learning_rate`; then a cosine stepped once an epoch [K]."""
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
    """Images a step, over all processes [C]."""
    epochs: Count = 20
    """Passes over the training images [C]."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs over which the rate climbs from zero [C]."""


class FullAdapt(AdamW):
    """Train every weight of the teacher on the labelled images, by cross-entropy [C]."""

    method: Literal["full"] = "full"
    """`full`"""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of the teacher alone, so that students of several seeds share one teacher."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes [C]."""


class Gaussian(Closed):
    """Which epochs' prompts are kept: their average, weighted by a normal density over the epoch's number."""

    mean: Positive | None = None
    """The epoch that counts most. Left out: three quarters of the epochs, 15 of 20 [S]."""
    deviation: Positive | None = None
    """In epochs. Left out: a twentieth of the epochs, 1 of 20 [S]."""


class PromptSrcAdapt(Sgd):
    """PromptSRC: learned tokens in both frozen encoders, from a few labelled images of each class."""

    method: Literal["promptsrc"] = "promptsrc"
    """`promptsrc`"""
    data: Data | None = None
    """Labelled images to adapt on, where they are others than the student's: cross-dataset and domain
    generalisation adapt on `{dataset: imagenet}`. Left out: the recipe's own data."""
    classes: Literal["all", "base"] = "all"
    """`base` adapts on the first half of the classes alone, for base-to-novel."""
    shots: Count | None = 16
    """Labelled images of each class, drawn with `seed`; null takes all [S]."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of the draw, the prompts and the order; students of several seeds share one teacher."""
    tokens: Count = 4
    """Learned tokens at each prompted layer of either encoder [P]."""
    vision_depth: Count = 9
    """Prompted layers of the image encoder [P]."""
    text_depth: Count = 9
    """Prompted layers of the text encoder [P]."""
    text_weight: Weight = 25.0
    """Of the L1 distance between prompted and frozen text features [S]."""
    image_weight: Weight = 10.0
    """Of the L1 distance between prompted and frozen image features [S]."""
    logits_weight: Weight = 1.0
    """Of the KL divergence between frozen and prompted logits [S]."""
    gaussian: Gaussian | None = Gaussian()
    """The prompts that are kept; null keeps the last epoch's [S]."""
    classes_at_once: Count = 64
    """Classes whose prompts are encoded at once; memory grows with this, not with the classes [C]."""


Adapt = Annotated[
    NoAdapt | FullAdapt | PromptSrcAdapt,
    Field(discriminator="method"),
    BeforeValidator(lambda value: {"method": value} if isinstance(value, str) else value),
]
Optim = Annotated[
    Sgd | AdamW,
    Field(discriminator="name"),
    BeforeValidator(lambda value: {"name": "sgd", **value} if isinstance(value, dict) else value),
]


class Model(Closed):
    """A CLIP: an open_clip architecture by name (`arch`) or written out (`config`)."""

    arch: str | None = None
    """An open_clip architecture, such as ViT-B-16-quickgelu; or hf-hub:ORG/NAME or local-dir:FOLDER, which
    bring their own weights."""
    config: Annotated[dict[str, Any], AfterValidator(_only_json)] | None = None
    """An open_clip model config: embed_dim, vision_cfg and, for a teacher, text_cfg. vision_cfg takes
    open_clip's own fields, or timm_model_name for any timm backbone; timm_model_pretrained: true starts
    that from timm's weights."""
    weights: str | None = None
    """An open_clip tag, such as openai, or a local file. Left out: random weights."""

    @model_validator(mode="after")
    def _one_architecture(self) -> Model:
        if (self.arch is None) == (self.config is None):
            raise ValueError("needs exactly one of `arch` and `config`")
        if self.config is not None:
            if absent := {"embed_dim", "vision_cfg"} - set(self.config):
                raise ValueError(f"`config` lacks {' and '.join(sorted(absent))}")
            for part in ("vision_cfg", "text_cfg"):
                if not isinstance(self.config.get(part, {}), dict):
                    raise ValueError(f"`config.{part}` should be a mapping of fields")
        if self.weights is not None and self.arch is not None and self.arch.startswith(SCHEMES):
            raise ValueError(f"{self.arch} brings its own weights: leave `weights` out")
        return self

    @property
    def has_weights(self) -> bool:
        """Whether it starts from trained weights of a CLIP, not from random ones."""
        return self.weights is not None or (self.arch is not None and self.arch.startswith(SCHEMES))


class Teacher(Model):
    """The large CLIP that is learned from."""

    adapt: Adapt = NoAdapt()
    """Stage 1: `none` keeps the zero-shot teacher, `promptsrc` learns prompts from a few labelled images,
    `full` trains every weight on all of them."""
    format: Literal["clip", "promptsrc"] = "clip"
    """Of the file in `weights`: `clip` is what open_clip reads; `promptsrc` a checkpoint as PromptSRC and
    PromptKD publish their teachers, with its prompts. It is read without running anything from it."""
    backbone_weights: str | None = None
    """With `format: promptsrc`: the CLIP that the prompts were learned on, an open_clip tag or a file, for the
    table of word embeddings that such checkpoints lack. Left out: `openai`."""

    @model_validator(mode="after")
    def _released(self) -> Teacher:
        if self.format == "promptsrc" and self.weights is None:
            raise ValueError("`format: promptsrc` needs `weights`: the checkpoint's file")
        if self.format == "promptsrc" and self.adapt.method != "none":
            raise ValueError("`format: promptsrc` is a teacher that is adapted already: use `adapt: none`")
        if self.format == "clip" and self.backbone_weights is not None:
            raise ValueError("`backbone_weights` belongs to `format: promptsrc`")
        return self

    @model_validator(mode="after")
    def _knows_something(self) -> Teacher:
        if not self.has_weights and self.adapt.method == "promptsrc":
            raise ValueError("has random weights, and promptsrc trains prompts alone: give `weights`")
        if not self.has_weights and self.adapt.method == "none":
            raise ValueError("has random weights: give `weights`, or train it with `adapt: full`")
        if self.config is not None and "text_cfg" not in self.config:
            raise ValueError("`config` lacks text_cfg: a teacher encodes the class names")
        return self


class Prompts(Closed):
    """Learned tokens beside the patches of a vision transformer."""

    tokens: Annotated[int, Field(ge=0)] = 4
    """Tokens at each prompted layer [P]."""
    depth: Count = 9
    """Layers whose prompt tokens are their own; the first counts [P]."""


class Projector(Closed):
    """From the student backbone's width to the teacher's: Linear, then BatchNorm, ReLU, Linear [K]."""

    layers: Annotated[int, Field(ge=1, le=4)] = 2
    """Linear layers [K]."""


class Student(Model):
    """The small model that learns. Only its image tower is built."""

    train: Literal["prompts", "full"] = "prompts"
    """`prompts` freezes the backbone but for its prompts; `full` trains every weight."""
    prompts: Prompts | None = None
    """Vision prompts. With `train: prompts` they default to 4 tokens, 9 deep; with `full`, to none."""
    projector: Projector = Projector()
    """[K]"""

    @model_validator(mode="after")
    def _trainable(self) -> Student:
        if self.train == "prompts" and not self.has_weights:
            raise ValueError("`train: prompts` freezes the backbone: give its `weights`, or use `train: full`")
        return self


class Refinement(Closed):
    """KL divergence from the teacher's class probabilities to the student's."""

    weight: Weight = 1000.0
    """Of KL summed over classes and divided by (images x classes) [K]."""
    temperature: Positive = 1.0
    """Both logits are divided by it [K]."""


class IFAlign(Closed):
    """L1 distance of the batch means and variances of teacher and student image features."""

    weight: Weight = 1.0
    """Of the sum over the feature dimensions [C]."""


class FeatureMse(Closed):
    """Mean squared difference of teacher and student image features, as CLIP-KD's feature distillation has it."""

    weight: Weight = 2000.0
    """Of the mean over images and dimensions (CLIP-KD's code)."""


class FeatureCosine(Closed):
    """One less the cosine of teacher and student image features."""

    weight: Weight = 1.0
    """Of the mean over the images; `feature_mse` is 2 / dimensions times this term [C]."""


class Labels(Closed):
    """Cross-entropy on the labels of the training images, for a student that learns from labels too."""

    weight: Weight = 1.0
    """Of the mean over the images [C]."""


class EduAttention(Closed):
    """Attention from the student's image feature to the teacher's class vectors."""

    scale: Positive | None = None
    """c of softmax(q K' / sqrt(c)); left out, the teacher's embedding width [C]."""
    memory: Literal["training", "candidates"] = "training"
    """`training`: the run's own class vectors, kept in the student. `candidates`: the classes at hand [C]."""
    gate_start: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """alpha at step 0; at 0 the student starts as the one without EduAttention [P]."""
    gate_learning_rate_factor: Positive = 1.0
    """alpha's learning rate, as a multiple of the others' [C]."""


class Loss(Closed):
    """The student's objective. `null` switches a part off; with if_align and edu_attention off, it is PromptKD."""

    refinement: Refinement | None = Refinement()
    """The teacher's logits [P][K]."""
    if_align: IFAlign | None = IFAlign()
    """The teacher's feature statistics [P]."""
    edu_attention: EduAttention | None = EduAttention()
    """The teacher's class vectors, attended to [P]."""
    feature_mse: FeatureMse | None = None
    """The teacher's feature of each image, by squared error."""
    feature_cosine: FeatureCosine | None = None
    """The teacher's feature of each image, by its direction."""
    labels: Labels | None = None
    """The labels of the training images, which must then have some. With the other terms null, the teacher gives
    the class vectors alone and does not see the images."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares the student with its teacher."""
        return any((self.refinement, self.if_align, self.feature_mse, self.feature_cosine))

    @property
    def uses_logits(self) -> bool:
        """Whether a term looks at the student's logits, which is all that EduAttention acts on."""
        return any((self.refinement, self.labels))

    @model_validator(mode="after")
    def _teaches_something(self) -> Loss:
        terms = (self.refinement, self.if_align, self.feature_mse, self.feature_cosine, self.labels)
        if not any(term.weight for term in terms if term is not None):
            raise ValueError(
                "teaches nothing: give `refinement`, `if_align`, `feature_mse`, `feature_cosine` or `labels` a weight "
                "above 0"
            )
        return self


class TeacherCacheSettings(Closed):
    """The teacher's image features of each crop, kept under RUNS/cache and shared by students, seeds and ablations."""

    views: Count = 20
    """Crops of an image that there are: epoch e sees crop e mod views. With as many as epochs, nothing repeats [C]."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of the crops, instead of the recipe's, so that students of several seeds share them [C]."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Of the kept features. With fp32, as many views as epochs and the recipe's seed, a run is the one without a
    cache [C]."""


class Recipe(Closed):
    """One distillation: the images, the teacher, the student, and how the one learns from the other."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Of this format. A recipe with a newer one than comkd knows is refused."""
    about: str = ""
    """One line for people."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of the student: its random weights, the order of the images and their crops."""
    data: Data
    """The images and the classes."""
    augment: Augment = Augment()
    """Of the training images, for teacher and student alike."""
    teacher: Teacher
    """The large model."""
    student: Student
    """The small model."""
    loss: Loss = Loss()
    """What the student is taught."""
    optim: Optim = Sgd()
    """How the student is trained."""
    teacher_cache: TeacherCacheSettings | None = None
    """Ask the teacher once for each crop; null asks it at every step."""
    selection: Literal["last", "promptkd"] = "last"
    """Which epoch is kept: the `last`, or as PromptKD's released code does, the one that is best on test images (see
    `selection_classes`). Only for comparison with its table: results are marked `selected on test`."""
    selection_classes: Literal["base", "all"] | None = None
    """With `selection: promptkd`: the classes whose test images the epoch is chosen on. Left out: `base` where the
    teacher is adapted on the recipe's own data with `classes: base` (base-to-novel), else `all`. Say `base` with a
    released teacher of base classes."""
    checkpointing: bool = False
    """Of the towers that train, keep only what goes into their blocks and compute the rest again for the backward
    pass: a third more time, far less memory, the same result. Not for towers with batch norms."""
    compile: bool = False
    """Compile the student's backbone and the teacher's image tower with torch.compile. The first steps take minutes,
    later ones less: worth it on GPUs. Needs a C++ compiler; results differ by rounding."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward and backward passes; losses are always fp32, weights too."""
    collective_timeout_minutes: Annotated[float, Field(gt=0, le=MINUTES_A_WEEK)] = 30.0
    """How long one of several processes waits for the others in a step before the run fails, a week at most.
    Downloads, indexing and saving are not limited by it [C]."""
    evaluate_every_epochs: Annotated[int, Field(ge=0)] = 1
    """Score the test images after every so many epochs, where they have labels; 0 scores at the end only. Scores are
    always computed in fp32, as `comkd evaluate` computes them; `selection: promptkd` needs one after every epoch."""

    @model_validator(mode="after")
    def _selects(self) -> Recipe:
        if self.selection_classes is not None and self.selection == "last":
            raise ValueError("`selection_classes` belongs to `selection: promptkd`")
        return self
