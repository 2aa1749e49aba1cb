"""Stage 1: a frozen CLIP learns prompts in both encoders, regularised by itself (PromptSRC, arXiv 2307.06948)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from comkd_cli.method.prompts import TextPrompts, VisionPrompts
from comkd_cli.method.refinement import class_logits, refinement
from comkd_cli.method.teacher import encode_classes

INITIAL_CONTEXT = "a photo of a"
MOST_TOKENS_FROM_WORDS = 4  # PromptSRC starts more learned tokens at random
CLASSES_AT_ONCE = 64


@dataclass(frozen=True)
class PromptedOutput:
    """Features and logits of a batch, of the prompted CLIP and of the frozen one within it."""

    image_features: Tensor
    """(batch, dim), L2-normalised."""
    text_features: Tensor
    """(classes, dim), L2-normalised: the class vectors."""
    logits: Tensor
    """(batch, classes), float32."""
    frozen_image_features: Tensor
    """(batch, dim), L2-normalised, without prompts."""
    frozen_logits: Tensor
    """(batch, classes), of the frozen image features over the frozen class vectors."""


class PromptedClip(nn.Module):
    """A frozen CLIP with independent deep vision and language prompts (IVLP): only the prompts are trained.

    clip: an open_clip model whose two towers are transformers; it gets the prompts, as `clip.visual` and
    by hooks. tokens: of each prompted layer, in both encoders. The first text tokens start as the
    embedding of "a photo of a" if there are at most as many, all others from N(0, 0.02^2). Raises
    ModelError.
    """

    def __init__(self, clip: Any, context: Tensor, tokens: int, vision_depth: int, text_depth: int) -> None:
        """context: the token ids of INITIAL_CONTEXT, (1, context)."""
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        embedding = getattr(clip, "text", clip).token_embedding
        words = embedding(context.to(embedding.weight.device))[0, 1 : 1 + tokens]
        clip.visual = VisionPrompts(clip.visual, tokens, vision_depth, "teacher.adapt.vision_depth")
        self.text = TextPrompts(clip, tokens, text_depth)
        if tokens <= len(INITIAL_CONTEXT.split()):
            with torch.no_grad():
                self.text.tokens[0] = words

    @property
    def vision(self) -> VisionPrompts:
        """The prompts in the image tower, and the tower."""
        prompts: VisionPrompts = self.clip.visual
        return prompts

    @property
    def logit_scale(self) -> Tensor:
        """exp of the frozen log-scale."""
        scale: Tensor = self.clip.logit_scale.detach().exp()
        return scale

    def prompts(self) -> dict[str, Tensor]:
        """The learned prompts, `vision` and `text`, each (depth, tokens, width)."""
        return {"vision": self.vision.tokens.detach(), "text": self.text.tokens.detach()}

    def encode_images(self, images: Tensor) -> Tensor:
        """(batch, 3, size, size) to L2-normalised (batch, dim), float32."""
        return functional.normalize(self.clip.encode_image(images).float(), dim=-1)

    def encode_classes(self, tokens: Tensor, at_once: int = CLASSES_AT_ONCE) -> Tensor:
        """Class vectors of prompts, (classes, context) token ids to L2-normalised (classes, dim).

        If gradients are on, each part of at most `at_once` classes is recomputed in the backward pass, so that
        the memory for activations depends on `at_once` and not on the number of classes.
        """
        parts = torch.split(tokens, at_once)
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([encode_classes(self.clip, part) for part in parts])
        vectors: list[Tensor] = [checkpoint(encode_classes, self.clip, part, use_reentrant=False) for part in parts]
        return torch.cat(vectors)

    def forward(self, images: Tensor, tokens: Tensor, frozen_classes: Tensor, at_once: int) -> PromptedOutput:
        """images: (batch, 3, size, size); tokens: (classes, context) ids; frozen_classes: (classes, dim)."""
        features, vectors = self.encode_images(images), self.encode_classes(tokens, at_once)
        with torch.no_grad(), self.vision.bypassed():
            frozen = self.encode_images(images)
        return PromptedOutput(
            image_features=features,
            text_features=vectors,
            logits=class_logits(features, vectors, self.logit_scale),
            frozen_image_features=frozen,
            frozen_logits=class_logits(frozen, frozen_classes, self.logit_scale),
        )

    def train(self, mode: bool = True) -> PromptedClip:
        """As nn.Module's, but the frozen CLIP stays in inference mode."""
        super().train(mode)
        self.clip.eval()
        return self


def class_prompt(name: str, tokens: int, context: str = INITIAL_CONTEXT) -> str:
    """The prompt of a class whose first `tokens` tokens the learned ones replace: "a photo of a {name}.".

    context: the words that the learned tokens started from, CTX_INIT in PromptSRC's code. Words beyond the learned
    tokens stay in the prompt. With more than 4 tokens, or without words, the placeholders are X, as in that code.
    """
    given = bool(context) and tokens <= MOST_TOKENS_FROM_WORDS
    prefix = context.replace("_", " ") if given else " ".join(["X"] * tokens)
    return f"{prefix} {name}."


def frozen_class_vectors(clip: Any, tokens_of_templates: Sequence[Tensor]) -> Tensor:
    """The frozen text features of each class, averaged over templates and then L2-normalised, (classes, dim).

    tokens_of_templates: for each template, the ids of its prompts, (classes, context). Call it before the
    CLIP gets prompts. PromptSRC averages them as the encoder returns them, unlike CLIP's own ensemble.
    """
    total: Tensor | float = 0.0
    with torch.no_grad():
        for tokens in tokens_of_templates:
            parts = [clip.encode_text(part).float() for part in torch.split(tokens, CLASSES_AT_ONCE)]
            total = total + torch.cat(parts)
    assert isinstance(total, Tensor)
    return functional.normalize(total / len(tokens_of_templates), dim=-1)


def prompt_src_terms(
    output: PromptedOutput,
    labels: Tensor,
    frozen_classes: Tensor,
    text_weight: float,
    image_weight: float,
    logits_weight: float,
) -> dict[str, Tensor]:
    """Stage 1's weighted terms; the objective is their sum (PromptSRC, arXiv 2307.06948, section 3.2).

    Cross-entropy; the mean |difference| of prompted and frozen text features, and of image features; and
    KL(frozen || prompted) of the logits as PromptSRC's code computes it: summed over batch and classes,
    divided by their product, with the prompted distribution in the place of the input. labels: (batch,).
    """
    return {
        "cross_entropy": functional.cross_entropy(output.logits, labels),
        "text": text_weight * functional.l1_loss(output.text_features, frozen_classes),
        "image": image_weight * functional.l1_loss(output.image_features, output.frozen_image_features),
        "logits": logits_weight * refinement(output.logits, output.frozen_logits, temperature=1.0),
    }


def epoch_weights(epochs: int, mean: float, deviation: float) -> list[float]:
    """The weight of each epoch's prompts in the average that is kept, a normal density over 1..epochs, summing to 1.

    Gaussian prompt aggregation (PromptSRC, section 3.3).
    """
    exponents = [-0.5 * ((epoch - mean) / deviation) ** 2 for epoch in range(1, epochs + 1)]
    # Relative to the largest: a mean far beyond the epochs would make every density 0.
    density = [math.exp(exponent - max(exponents)) for exponent in exponents]
    return [value / sum(density) for value in density]
