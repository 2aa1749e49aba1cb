"""A CLIP in a recipe: its architecture and weights, for teacher and student alike."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, model_validator

from comkd_cli.recipe.fields import Closed

# Prefixes of open_clip names that include weights.
SCHEMES = ("hf-hub:", "local-dir:")


def _only_json(config: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"should contain only numbers, words, lists and mappings: {error}") from error
    return config


class Model(Closed):
    """A CLIP: an open_clip architecture by name (`arch`) or written out (`config`)."""

    arch: str | None = None
    """An open_clip architecture, such as ViT-B-16-quickgelu; or hf-hub:ORG/NAME or local-dir:FOLDER, which
    include weights."""
    config: Annotated[dict[str, Any], AfterValidator(_only_json)] | None = None
    """An open_clip model config: embed_dim, vision_cfg and, for a teacher, text_cfg. vision_cfg takes
    open_clip's own fields, or timm_model_name for any timm backbone; with timm_model_pretrained: true it starts from
    timm's weights."""
    weights: str | None = None
    """An open_clip tag, such as openai, or a local file. Default: random weights."""

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
            raise ValueError(f"{self.arch} includes weights: leave `weights` out")
        return self

    @property
    def has_weights(self) -> bool:
        """Whether it starts from trained weights of a CLIP, not from random ones."""
        return self.weights is not None or (self.arch is not None and self.arch.startswith(SCHEMES))
