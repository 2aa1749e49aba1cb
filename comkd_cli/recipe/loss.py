"""The `loss` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from comkd_cli.recipe.fields import Closed, Positive, Weight


class Refinement(Closed):
    """KL divergence from the teacher's class probabilities to the student's."""

    weight: Weight = 1000.0
    """Weight of the KL divergence, summed over classes and divided by (images x classes) [K]."""
    temperature: Positive = 1.0
    """Temperature that the teacher's and the student's logits are divided by [K]."""


class IFAlign(Closed):
    """L1 distance of the batch means and variances of teacher and student image features."""

    weight: Weight = 1.0
    """Weight of the sum over the feature dimensions [C]."""


class FeatureMse(Closed):
    """Mean squared difference of teacher and student image features, as in CLIP-KD's feature distillation."""

    weight: Weight = 2000.0
    """Weight of the mean over images and dimensions (CLIP-KD's code)."""


class FeatureCosine(Closed):
    """One minus the cosine of teacher and student image features."""

    weight: Weight = 1.0
    """Weight of the mean over the images; `feature_mse` is 2 / dimensions times this term [C]."""


class Labels(Closed):
    """Cross-entropy on the labels of the training images that have one."""

    weight: Weight = 1.0
    """Weight of the mean over the labelled images of a batch [C]."""


class EduAttention(Closed):
    """Attention from the student's image feature to the teacher's class vectors."""

    scale: Positive | None = None
    """c of softmax(q K' / sqrt(c)); default: the teacher's embedding width [C]."""
    memory: Literal["training", "candidates"] = "training"
    """`training`: the class vectors of the run, kept in the student. `candidates`: those of the classes scored [C]."""
    gate_start: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """alpha at step 0; at 0 the student starts as it would without EduAttention [P]."""
    gate_learning_rate_factor: Positive = 1.0
    """alpha's learning rate, as a multiple of that of the other parameters [C]."""


class Loss(Closed):
    """The student's objective: PromptKD's by default, ComKD's with if_align and edu_attention. `null` switches a part
    off. docs/experiments.md compares them."""

    refinement: Refinement | None = Refinement()
    """The teacher's logits [P][K]."""
    if_align: IFAlign | None = None
    """The teacher's feature statistics [P]."""
    edu_attention: EduAttention | None = None
    """The teacher's class vectors, attended to [P]."""
    feature_mse: FeatureMse | None = None
    """The teacher's feature of each image, by squared error."""
    feature_cosine: FeatureCosine | None = None
    """The teacher's feature of each image, by its direction."""
    labels: Labels | None = None
    """The labels of the training images. With the other terms null, only the teacher's class vectors are used, and the
    teacher does not run on images."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares the student with its teacher."""
        return any((self.refinement, self.if_align, self.feature_mse, self.feature_cosine))

    @property
    def uses_logits(self) -> bool:
        """Whether a term uses the student's logits, which are all that EduAttention changes."""
        return any((self.refinement, self.labels))

    @model_validator(mode="after")
    def _has_a_term(self) -> Loss:
        terms = (self.refinement, self.if_align, self.feature_mse, self.feature_cosine, self.labels)
        if not any(term.weight for term in terms if term is not None):
            raise ValueError(
                "is always zero: give `refinement`, `if_align`, `feature_mse`, `feature_cosine` or `labels` a weight "
                "above 0"
            )
        return self
