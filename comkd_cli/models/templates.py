"""Ensembles of prompt templates; `{}` stands for the class name."""

from __future__ import annotations

import open_clip

# The 80 prompts of openai/CLIP's ImageNet ensemble.
IMAGENET_TEMPLATES = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
# The 20 of them that PromptSRC leaves out (PromptSRC, trainers/imagenet_templates.py).
NOT_IN_PROMPTSRC = frozenset(
    {
        "a jpeg corrupted photo of the {}.",
        "a good photo of a {}.",
        "a plushie {}.",
        "a photo of the nice {}.",
        "a photo of the small {}.",
        "a photo of the weird {}.",
        "the cartoon {}.",
        "art of the {}.",
        "a drawing of the {}.",
        "a photo of the large {}.",
        "a black and white photo of a {}.",
        "the plushie {}.",
        "a dark photo of a {}.",
        "itap of a {}.",
        "graffiti of the {}.",
        "a toy {}.",
        "itap of my {}.",
        "a photo of a cool {}.",
        "a photo of a small {}.",
        "a tattoo of the {}.",
    }
)
# PromptSRC regularises its text prompts towards these 60.
PROMPTSRC_TEMPLATES = tuple(template for template in IMAGENET_TEMPLATES if template not in NOT_IN_PROMPTSRC)
