"""The teacher: a frozen image encoder with class vectors that are computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comkd_cli.method.refinement import class_logits

MOST_LOGIT_SCALE = 100.0  # CLIP clips its learned scale there (arXiv 2103.00020, section 2.5)


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's features and logits of a batch of images."""

    features: Tensor
    """u_t: (batch, dim), L2-normalised."""
    logits: Tensor
    """(batch, classes), float32."""


class Teacher(nn.Module):
    """A frozen image tower with the class vectors of the run.

    class_vectors: (classes, dim), L2-normalised; logit_scale: exp of CLIP's learned log-scale.
    """

    class_vectors: Tensor
    logit_scale: Tensor

    def __init__(self, image_tower: nn.Module, class_vectors: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.image_tower = image_tower.requires_grad_(False)
        self.register_buffer("class_vectors", class_vectors)
        self.register_buffer("logit_scale", logit_scale)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """images: (batch, 3, size, size)."""
        return self.answer(self.encode(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """u_t: the L2-normalised image features, (batch, dim) float32."""
        return nn.functional.normalize(self.image_tower(images).float(), dim=-1)

    def answer(self, features: Tensor) -> TeacherOutput:
        """Features, (batch, dim), and their logits over the class vectors."""
        return TeacherOutput(features, class_logits(features, self.class_vectors, self.logit_scale))


def encode_classes(clip: Any, tokens: Tensor) -> Tensor:
    """Class vectors W: the L2-normalised text features of the class prompts.

    clip: an open_clip model. tokens: (classes, context). Returns float32 (classes, dim), with gradients
    if they are on.
    """
    return nn.functional.normalize(clip.encode_text(tokens).float(), dim=-1)


class PromptClassifier(nn.Module):
    """A whole CLIP as a classifier over class prompts, for `adapt: full`: every weight is trained.

    clip: an open_clip model. tokens: (classes, context), the prompts' token ids.
    """

    tokens: Tensor

    def __init__(self, clip: Any, tokens: Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("tokens", tokens, persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned log-scale, at most 100."""
        scale: Tensor = self.clip.logit_scale.exp().clamp(max=MOST_LOGIT_SCALE)
        return scale

    def forward(self, images: Tensor, class_vectors: Tensor | None = None) -> Tensor:
        """images: (batch, 3, size, size). Returns logits (batch, classes), float32.

        class_vectors: (classes, dim), if they are computed already; None encodes the prompts.
        """
        features = nn.functional.normalize(self.clip.encode_image(images).float(), dim=-1)
        vectors = self.encode_classes() if class_vectors is None else class_vectors
        return class_logits(features, vectors, self.logit_scale)

    def encode_classes(self) -> Tensor:
        """The class vectors of the prompts with the current weights of the text encoder, (classes, dim)."""
        return encode_classes(self.clip, self.tokens)
