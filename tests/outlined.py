"""To outline an image tower on the meta device takes a second: what was outlined before is used again."""

from functools import cache

import pytest

from comkd_cli.models import choice
from comkd_cli.models.backbones import ImageTower, outline_image_tower
from comkd_cli.recipe.model import Model

FIELDS = set(Model.model_fields)


def outline_once(patch: pytest.MonkeyPatch) -> None:
    """Let the models that `comkd init` chooses from be outlined once."""
    patch.setattr(choice, "outline_image_tower", outlined)


def outlined(model: Model) -> ImageTower:
    """What outline_image_tower returns, which is not to be changed."""
    return _outlined(model.model_dump_json(include=FIELDS))


@cache
def _outlined(settings: str) -> ImageTower:
    """settings: a Model as JSON, which a cache can compare."""
    return outline_image_tower(Model.model_validate_json(settings))
