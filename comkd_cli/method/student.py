"""The student: backbone, projector and EduAttention, which classify in the teacher's embedding space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comkd_cli.method.edu_attention import EduAttention
from comkd_cli.method.projector import projector
from comkd_cli.method.prompts import VisionPrompts
from comkd_cli.method.refinement import class_logits, without_autocast
from comkd_cli.recipe import model as recipe


@dataclass(frozen=True)
class StudentOutput:
    """The student's features and logits of a batch of images."""

    projected: Tensor
    """u_s: (batch, dim), as the projector returns it; IFAlign compares it once normalised."""
    features: Tensor
    """n(f_e): (batch, dim), L2-normalised; the image features of the finished student."""
    logits: Tensor
    """(batch, classes), float32."""


class Student(nn.Module):
    """backbone -> projector -> EduAttention -> normalise -> logits over class vectors.

    backbone: images to (batch, width). class_vectors: (classes, dim) of the distillation run,
    L2-normalised; logit_scale: a scalar; both the teacher's, and frozen.
    """

    class_vectors: Tensor
    logit_scale: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        class_vectors: Tensor,
        logit_scale: Tensor,
        settings: recipe.Student,
        edu_attention: recipe.EduAttention | None,
    ) -> None:
        super().__init__()
        dim = class_vectors.shape[1]
        prompts = settings.prompts
        self._frozen_backbone = settings.train == "prompts"
        if self._frozen_backbone:
            backbone.requires_grad_(False)
            prompts = prompts or recipe.Prompts()
        self.backbone = VisionPrompts(backbone, prompts.tokens, prompts.depth) if prompts else backbone
        self.projector = projector(width, dim, settings.projector.layers)
        self.edu_attention = EduAttention(dim, edu_attention.scale, edu_attention.gate_start) if edu_attention else None
        self.uses_candidates = edu_attention is not None and edu_attention.memory == "candidates"
        # A checkpoint holds them apart from the learned weights.
        self.register_buffer("class_vectors", class_vectors.clone(), persistent=False)
        self.register_buffer("logit_scale", logit_scale.clone(), persistent=False)
        self._memory_size = len(class_vectors)

    def forward(self, images: Tensor, class_vectors: Tensor | None = None) -> StudentOutput:
        """images: (batch, 3, size, size). class_vectors: (classes, dim) to classify among; None: the run's own.

        EduAttention's memory is the class vectors of the training run, or with `memory: candidates` the given ones.
        """
        candidates = self.class_vectors if class_vectors is None else class_vectors
        projected = self.project(images)
        features = self.attend(projected, candidates)
        return StudentOutput(projected, features, class_logits(features, candidates, self.logit_scale))

    def project(self, images: Tensor) -> Tensor:
        """u_s: the half of the student that sees images, (batch, 3, size, size) to (batch, dim)."""
        projected: Tensor = self.projector(self.backbone(images))
        return projected

    def attend(self, projected: Tensor, class_vectors: Tensor) -> Tensor:
        """n(f_e): the half that may depend on the label set, (batch, dim) to unit-length (batch, dim)."""
        if self.edu_attention is None:
            return _unit(projected)
        memory = class_vectors if self.uses_candidates else self.memory
        return _unit(self.edu_attention(projected, memory))

    @property
    def memory(self) -> Tensor:
        """EduAttention's memory without `memory: candidates`: the class vectors of the training run, (classes, dim)."""
        has_more = len(self.class_vectors) > self._memory_size
        return self.class_vectors[: self._memory_size] if has_more else self.class_vectors

    def add_classes(self, class_vectors: Tensor) -> None:
        """Add classes that it was not trained on, by their vectors (classes, dim), L2-normalised.

        EduAttention's memory of the run's own class vectors stays as it was trained; with `memory: candidates` the new
        ones are part of it.
        """
        self.class_vectors = torch.cat([self.class_vectors, class_vectors.to(self.class_vectors)])

    def train(self, mode: bool = True) -> Student:
        """As nn.Module's, but a frozen backbone stays in inference mode: no dropout, no moving statistics."""
        super().train(mode)
        if self._frozen_backbone:
            self.backbone.eval()
        return self

    def learned_state(self) -> dict[str, Tensor]:
        """The tensors that training can change, as `learned_state` returns them."""
        return learned_state(self)

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        """Load what `learned_state` returned. Raises RuntimeError if names or shapes differ."""
        expected = set(self.learned_state())
        if set(state) != expected:
            unmatched = sorted(set(state) ^ expected)
            raise RuntimeError(f"the tensors differ: {', '.join(unmatched[:5])}")
        self.load_state_dict(state, strict=False)

    @property
    def gate(self) -> float | None:
        """EduAttention's alpha, or None without EduAttention."""
        return None if self.edu_attention is None else float(self.edu_attention.gate.detach())


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that training can change: trainable parameters, and the statistics of norms.

    With a frozen backbone a checkpoint needs only these and the backbone's own weights.
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def _unit(features: Tensor) -> Tensor:
    """L2-normalised in float32: half precision would leave norms that are off by 1e-3."""
    with without_autocast(features.device):
        return nn.functional.normalize(features.float(), dim=-1)
