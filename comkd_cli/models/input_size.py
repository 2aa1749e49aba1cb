"""The side of a model's input, without building the model."""

from __future__ import annotations

from typing import Any

import open_clip

from comkd_cli.models.backbones import outline_image_tower
from comkd_cli.recipe.model import SCHEMES, Model

DEFAULT = 224  # open_clip's, of a config without `image_size`


def input_size(model: Model) -> int:
    """The side of the square input in pixels. Raises ModelError."""
    config: dict[str, Any] | None = model.config
    if model.arch is not None and not model.arch.startswith(SCHEMES):
        config = open_clip.get_model_config(model.arch)
    vision = (config or {}).get("vision_cfg")
    size = vision.get("image_size", DEFAULT) if isinstance(vision, dict) else None
    # What no config states is read from the model itself: it is built on the meta device.
    return size if isinstance(size, int) else outline_image_tower(model).preprocessing.size
