"""A recipe and its sections. Every field's docstring is its documentation: docs/recipes.md is made from them.

Defaults marked [K] are PromptKD's, [S] PromptSRC's, [P] the ComKD-CLIP paper's, [C] this project's choice
where those are silent.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from comkd_cli.recipe.architecture import SCHEMES, Model
from comkd_cli.recipe.data import (
    DATASETS,
    DEFAULT_TEMPLATE,
    OPENAI_TEMPLATES,
    UNLABELLED,
    Augment,
    Data,
    Images,
    Mix,
    RandAugment,
)
from comkd_cli.recipe.fields import Closed
from comkd_cli.recipe.loss import EduAttention, FeatureCosine, FeatureMse, IFAlign, Labels, Loss, Refinement
from comkd_cli.recipe.optim import AdamW, Optim, Sgd
from comkd_cli.recipe.student import Projector, Prompts, Student
from comkd_cli.recipe.teacher import (
    Adapt,
    FullAdapt,
    Gaussian,
    LinearProbeAdapt,
    NoAdapt,
    PromptSrcAdapt,
    Teacher,
    TeacherCacheSettings,
)

__all__ = [
    "DATASETS",
    "DEFAULT_TEMPLATE",
    "OPENAI_TEMPLATES",
    "SCHEMA_VERSION",
    "SCHEMES",
    "UNLABELLED",
    "AdamW",
    "Adapt",
    "Augment",
    "Closed",
    "Data",
    "EduAttention",
    "FeatureCosine",
    "FeatureMse",
    "FullAdapt",
    "Gaussian",
    "IFAlign",
    "Images",
    "Labels",
    "LinearProbeAdapt",
    "Loss",
    "Mix",
    "Model",
    "NoAdapt",
    "Optim",
    "Projector",
    "PromptSrcAdapt",
    "Prompts",
    "RandAugment",
    "Recipe",
    "Refinement",
    "Sgd",
    "Student",
    "Teacher",
    "TeacherCacheSettings",
]

SCHEMA_VERSION: Literal[1] = 1
MINUTES_A_WEEK = 7 * 24 * 60


def _only_integer(version: object) -> object:
    if type(version) is not int:  # a literal accepts values that are equal to it, such as true and 1.0
        raise ValueError(f"should be the number {SCHEMA_VERSION}, not {version!r}")
    return version


class Recipe(Closed):
    """One distillation: the images, the teacher, the student, and how the student is trained."""

    schema_version: Annotated[Literal[1], BeforeValidator(_only_integer)] = SCHEMA_VERSION
    """Version of the recipe format. A recipe with a newer version than comkd knows is refused."""
    about: str = ""
    """A description in one line."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of the student: its random weights, the order of the images and their crops."""
    data: Data
    """The images and the classes."""
    augment: Augment = Augment()
    """Augmentation of the training images, for teacher and student alike."""
    teacher: Teacher
    """The large model."""
    student: Student
    """The small model."""
    loss: Loss = Loss()
    """The terms of the student's loss."""
    optim: Optim = Sgd()
    """How the student is trained."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Score and save an exponential moving average of the student's weights and norm statistics, with this decay per
    step. In the first steps, the decay is (1 + step) / (10 + step) if that is smaller. null: the last weights [C]."""
    teacher_cache: TeacherCacheSettings | None = None
    """Run the teacher once for each crop and keep its features; null runs it at every step."""
    selection: Literal["last", "promptkd"] = "last"
    """Which epoch is kept: the `last`; or with `promptkd`, as in PromptKD's released code, the best one on test images
    (see `selection_classes`). Only for comparison with its table: results are marked `selected on test`."""
    selection_classes: Literal["base", "all"] | None = None
    """With `selection: promptkd`: the classes whose test images the epoch is chosen on. Default: `base` if the
    teacher is adapted on the recipe's own data with `classes: base` (base-to-novel), otherwise `all`. Set `base` for a
    released teacher that was trained on the base classes."""
    checkpointing: bool = False
    """Activation checkpointing: for the towers that are trained, keep only the inputs of their blocks and recompute the
    rest in the backward pass. A third more time, far less memory, the same result. Not for towers with batch norms."""
    compile: bool = False
    """Compile the student's backbone and the teacher's image tower with torch.compile. The first steps take minutes,
    later ones less: worth it on GPUs. Needs a C++ compiler; results differ by rounding."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward passes; losses and weights are always fp32."""
    collective_timeout_minutes: Annotated[float, Field(gt=0, le=MINUTES_A_WEEK)] = 30.0
    """How long one of several processes waits for the others in a step before the run fails, at most a week.
    Downloads, indexing and saving have no limit [C]."""
    track: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Field(strict=False)] = ()
    """Trackers that receive the figures of metrics.jsonl after each epoch; each is an extra of comkd (`pip install
    'comkd[tensorboard]'`). TensorBoard's files are in RUN/tensorboard, MLflow's in RUN/mlflow unless its environment
    variables name a server. A tracker that fails is reported once; the student does not depend on trackers [C]."""
    track_every_steps: Annotated[int, Field(ge=0)] = 0
    """With `track`: also send the epoch's averages so far, every this many steps; 0: only after each epoch [C]."""
    checkpoint_every_minutes: Annotated[float, Field(gt=0, le=MINUTES_A_WEEK)] = 10.0
    """How often a checkpoint of the teacher or the student is saved within an epoch: the most training time that a kill
    or a power loss costs. One is also saved at the end of each epoch and when the run is stopped; the last two are kept
    [C]."""
    evaluate_every_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs between scores of the test or held-out images (top-1, or agreement if they have no labels); 0 scores at
    the end only. Scores are always computed in fp32, as by `comkd evaluate`; `selection: promptkd` needs a score after
    every epoch."""

    @model_validator(mode="after")
    def _learns_its_own_words(self) -> Recipe:
        adapt = self.teacher.adapt
        if self.teacher.format != "promptsrc" and not isinstance(adapt, PromptSrcAdapt):
            return self
        of_teacher = getattr(adapt, "data", None)
        for place, data in (("data", self.data), ("teacher.adapt.data", of_teacher)):
            if data is not None and data.words is not None:
                raise ValueError(f"promptsrc learns the words of its prompts: leave `{place}.{data.words}` out")
        return self

    @model_validator(mode="after")
    def _mixes_unlabelled(self) -> Recipe:
        if self.augment.mix is not None and self.loss.labels is not None:
            raise ValueError("a mixed crop has no single label: leave out `augment.mix` or `loss.labels`")
        return self

    @model_validator(mode="after")
    def _keeps_one_result(self) -> Recipe:
        if self.ema_decay is not None and self.selection != "last":
            raise ValueError("`ema_decay` keeps the average of all steps: leave it out with `selection: promptkd`")
        return self

    @model_validator(mode="after")
    def _selects(self) -> Recipe:
        if self.selection_classes is not None and self.selection == "last":
            raise ValueError("`selection_classes` needs `selection: promptkd`")
        return self
