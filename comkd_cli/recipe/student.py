"""The `student` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from comkd_cli.recipe.architecture import Model
from comkd_cli.recipe.fields import Closed, Count


class Prompts(Closed):
    """Learned tokens beside the patches of a vision transformer."""

    tokens: Annotated[int, Field(ge=0)] = 4
    """Learned tokens at each prompted layer [P]."""
    depth: Count = 9
    """Prompted layers, from the first; each has its own tokens [P]."""


class Projector(Closed):
    """From the student backbone's width to the teacher's: Linear, then BatchNorm, ReLU, Linear [K]."""

    layers: Annotated[int, Field(ge=1, le=4)] = 2
    """Linear layers [K]."""


class Student(Model):
    """The small model that is trained. Only its image tower is built."""

    weights: str | None = None
    """An open_clip tag, such as openai, or a local file; or the student.pt of a finished run of the same architecture
    and `train`, from which the new run starts: every tensor of the same name and shape is loaded, and a notice names
    the rest. Default: random weights."""
    format: Literal["clip", "promptkd"] = "clip"
    """Format of the file in `weights`: `promptkd` is a student as PromptKD's code saves it, which `comkd
    import-student` converts to a student.pt without training. No code in the file is run."""
    train: Literal["prompts", "full"] = "prompts"
    """`prompts` trains vision prompts in a frozen backbone; `full` trains every weight."""
    shots: Count | None = None
    """Train on this many images of each class, drawn by their labels with the recipe's seed as CoOp draws them
    (NUM_SHOTS in PromptKD's code); the labels are used only for the draw. null: all training images [K]."""
    prompts: Prompts | None = None
    """Vision prompts. Default: 4 tokens in 9 layers with `train: prompts`, none with `full`."""
    projector: Projector = Projector()
    """[K]"""

    @model_validator(mode="after")
    def _trainable(self) -> Student:
        if self.format == "promptkd" and self.weights is None:
            raise ValueError("`format: promptkd` needs `weights`: the student's file")
        if self.train == "prompts" and not self.has_weights:
            raise ValueError("`train: prompts` freezes the backbone: set its `weights`, or use `train: full`")
        return self
