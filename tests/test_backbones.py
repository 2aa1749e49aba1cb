import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.backbones import build_clip, build_image_tower, state_sha256, weights_sha256
from comkd_cli.errors import ModelError
from comkd_cli.recipe.model import Model
from tests import tiny
from tests.hub import hub

CONVOLUTIONAL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}


def timm(**changes: object) -> dict[str, Any]:
    vision = {"image_size": 32, "timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "none"}
    return {"embed_dim": 12, "vision_cfg": {**vision, **changes}}


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = build_clip(Model(config=tiny.CLIP), seed=1).model
    state = torch.get_rng_state()
    second, other = (build_clip(Model(config=tiny.CLIP), seed=seed).model for seed in (1, 2))
    assert state_sha256(first) == state_sha256(second) != state_sha256(other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("config", "width"), [(tiny.TOWER, 12), (CONVOLUTIONAL, 12), (timm(), 256)])
def test_a_tower_needs_no_text_tower_and_tells_its_width(config: dict[str, Any], width: int) -> None:
    tower = build_image_tower(Model(config=config), seed=1)
    side = tower.preprocessing.size
    assert tower.width == width
    assert tower.module(torch.zeros(2, 3, side, side)).shape == (2, width)


def test_convolutional_towers_keep_channels_last() -> None:
    def strides(config: dict[str, Any]) -> bool:
        weights = [p for p in build_image_tower(Model(config=config)).module.parameters() if p.ndim == 4]
        return all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)

    assert strides(CONVOLUTIONAL)
    assert strides(timm())


def test_a_tower_is_read_from_a_file_of_its_own_or_of_a_whole_clip(tmp_path: Path) -> None:
    clip = build_clip(Model(config=tiny.CLIP), seed=4).model
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    torch.save(clip.visual.state_dict(), tmp_path / "tower.pt")  # type: ignore[union-attr,operator]
    alone = {key: value for key, value in tiny.CLIP.items() if key != "text_cfg"}
    for name in ("clip.pt", "tower.pt"):
        tower = build_image_tower(Model(config=alone, weights=str(tmp_path / name)))
        assert state_sha256(tower.module) == state_sha256(clip.visual)  # type: ignore[arg-type]
        assert tower.origin.weights_sha256 == weights_sha256(Model(config=alone, weights=str(tmp_path / name)))


@pytest.mark.parametrize("content", [b"not a checkpoint", None])
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "w.pt"
    if content is None:
        torch.save({"something": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    for build, config in ((build_clip, tiny.CLIP), (build_image_tower, tiny.TOWER)):
        with pytest.raises(ModelError, match=r"w\.pt: does not hold weights"):
            build(Model(config=config, weights=str(path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**tiny.CLIP, "text_cfg": {**tiny.CLIP["text_cfg"], "vocab_size": 100}}, "can't encode a prompt"),  # type: ignore[dict-item]
        ({**tiny.CLIP, "vision_cfg": {"width": 16, "nonsense": 3}}, "open_clip can't build this model"),
        ({**tiny.CLIP, "vision_cfg": {**CONVOLUTIONAL["vision_cfg"], "image_size": 24}}, "can't turn 24 x 24 images"),  # type: ignore[dict-item]
        ({**tiny.CLIP, "vision_cfg": timm(image_size="32")["vision_cfg"]}, "image_size"),
        ({**tiny.CLIP, "vision_cfg": timm(image_size=[32, 64])["vision_cfg"]}, "image_size"),
        ({**tiny.CLIP, "vision_cfg": timm(timm_model_name="nothing")["vision_cfg"]}, "open_clip can't build"),
    ],
)
def test_a_config_that_can_not_work_is_told_when_it_is_built(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_clip(Model(config=config))


def test_an_architecture_whose_tokenizer_is_not_installed_is_explained() -> None:
    with pytest.raises(ModelError, match="its tokenizer can't be had"):
        build_clip(Model(arch="ViT-B-16-SigLIP", weights="webli"))


def test_a_folder_brings_its_own_weights_and_is_told_apart_by_them(tmp_path: Path) -> None:
    model = Model(arch=f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": {}}))
    with pytest.raises(ModelError, match="can't load"):
        build_clip(model)
    digests = set()
    for seed in (1, 2):
        made = build_clip(Model(config=tiny.CLIP), seed=seed).model
        torch.save(made.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        assert state_sha256(build_clip(model).model) == state_sha256(made)
        digests.add(weights_sha256(model))
    assert len(digests) == 2


def test_a_model_of_a_hub_is_scored(tmp_path: Path) -> None:
    weights = tmp_path / "w.bin"
    torch.save(build_clip(Model(config=tiny.CLIP), seed=1).model.state_dict(), weights)
    with hub() as (url, handler):
        handler.files["someone/tiny/open_clip_config.json"] = json.dumps(
            {"model_cfg": tiny.CLIP, "preprocess_cfg": {}}
        ).encode()
        handler.files["someone/tiny/open_clip_pytorch_model.bin"] = weights.read_bytes()
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        command = [
            sys.executable,
            "-m",
            "comkd_cli",
            "evaluate",
            "hf-hub:someone/tiny",
            "--dataset",
            "digits",
            "--json",
        ]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["records"]
    assert (record["role"], record["images"]) == ("baseline", 360)
