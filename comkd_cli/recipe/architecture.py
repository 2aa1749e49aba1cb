"""A CLIP in a recipe: its architecture and weights, for teacher and student alike."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, model_validator

from comkd_cli.recipe.fields import Closed

MOST_WEIGHTS = 2**34
"""Of a transformer that a config describes, as `weights_of_transformer` estimates them; the largest CLIP has about
2**32."""
MOST_COUNT = 1e9  # of any number in a config
# Prefixes of open_clip names that include weights.
SCHEMES = ("hf-hub:", "local-dir:")


def _only_json(config: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"should contain only numbers, words, lists and mappings: {error}") from error
    return config


def weights_of_transformer(part: Any) -> float:
    """About how many weights the transformer of a `vision_cfg` or a `text_cfg` has; 0 for anything else.

    Each layer has 4 width^2 of attention and 2 mlp_ratio width^2 of its MLP; then there are the patches, their
    positions, and the vocabulary.
    """
    if not isinstance(part, dict):
        return 0
    layers, width = (_count(part.get(name), 0) for name in ("layers", "width"))
    ratio, patch = (_count(part.get(name), default) for name, default in (("mlp_ratio", 4), ("patch_size", 16)))
    sides = part.get("image_size")
    side = max((_count(each, 0) for each in sides), default=0) if isinstance(sides, list) else _count(sides, 0)
    positions = (side / patch) ** 2 + 3 * patch**2 + _count(part.get("vocab_size"), 0)
    return layers * width**2 * (4 + 2 * ratio) + positions * width


def _count(value: Any, default: float) -> float:
    """A positive number of a config, at most MOST_COUNT; the default for anything else, which is left to open_clip."""
    return float(min(value, MOST_COUNT)) if isinstance(value, int | float) and value > 0 else default


class Model(Closed):
    """A CLIP: an open_clip architecture by name (`arch`) or written out (`config`)."""

    arch: str | None = None
    """An open_clip architecture, such as ViT-B-16-quickgelu; or hf-hub:ORG/NAME or local-dir:FOLDER, which
    include weights."""
    config: Annotated[dict[str, Any], AfterValidator(_only_json)] | None = None
    """An open_clip model config: embed_dim, vision_cfg and, for a teacher, text_cfg. vision_cfg accepts
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
                if (count := weights_of_transformer(self.config.get(part))) > MOST_WEIGHTS:
                    raise ValueError(
                        f"`config.{part}` describes about {count:,.0f} weights, more than {MOST_WEIGHTS:,}"
                    )
        if self.weights is not None and self.arch is not None and self.arch.startswith(SCHEMES):
            raise ValueError(f"{self.arch} includes weights: leave `weights` out")
        return self

    @property
    def has_weights(self) -> bool:
        """Whether it starts from trained weights of a CLIP, not from random ones."""
        return self.weights is not None or (self.arch is not None and self.arch.startswith(SCHEMES))
