import json
from pathlib import Path

import pytest

from comkd_cli.models.backbones import outline_image_tower
from comkd_cli.models.input_size import input_size
from comkd_cli.recipe.model import Model
from tests import tiny

TIMM_TOWER = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "none"}
TIMM = {"embed_dim": 16, "vision_cfg": TIMM_TOWER}


@pytest.mark.parametrize(
    "model",
    [
        Model(config=tiny.TOWER),
        Model(config=TIMM),
        Model(config={**TIMM, "vision_cfg": {**TIMM_TOWER, "image_size": 64}}),
        Model(arch="ViT-S-32-alt"),
    ],
    ids=["tower", "timm", "timm of 64 pixels", "by name"],
)
def test_the_size_is_that_of_the_tower_that_is_built(model: Model) -> None:
    assert input_size(model) == outline_image_tower(model).preprocessing.size


def test_a_folder_says_its_size(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": {}}))
    assert input_size(Model(arch=f"local-dir:{tmp_path}")) == 16
