import json
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.errors import ModelError
from comkd_cli.events import Event, Notice
from comkd_cli.models.backbones import (
    build_clip,
    build_image_tower,
    outline_clip,
    outline_image_tower,
    state_sha256,
    weights_sha256,
)
from comkd_cli.recipe.model import Model
from tests import tiny, warm
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
def test_a_tower_needs_no_text_tower_and_measures_its_width(config: dict[str, Any], width: int) -> None:
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
        with pytest.raises(ModelError, match="does not hold weights") as caught:
            build(Model(config=config, weights=str(path)))
        assert caught.value.path == path


@pytest.mark.parametrize(
    ("config", "field", "reason"),
    [
        ({**tiny.CLIP, "text_cfg": {**tiny.CLIP["text_cfg"], "vocab_size": 100}}, None, "text tower"),  # type: ignore[dict-item]
        ({**tiny.CLIP, "vision_cfg": {"width": 16, "nonsense": 3}}, "config", "nonsense"),
        ({**tiny.CLIP, "vision_cfg": {**CONVOLUTIONAL["vision_cfg"], "image_size": 24}}, None, "24 x 24"),  # type: ignore[dict-item]
        ({**tiny.CLIP, "vision_cfg": timm(image_size="32")["vision_cfg"]}, None, "pre-processing"),
        ({**tiny.CLIP, "vision_cfg": timm(image_size=[32, 64])["vision_cfg"]}, None, "pre-processing"),
        ({**tiny.CLIP, "vision_cfg": timm(timm_model_name="nothing")["vision_cfg"]}, "config", "nothing"),
    ],
)
def test_a_config_that_cannot_work_fails_when_it_is_built(
    config: dict[str, Any], field: str | None, reason: str
) -> None:
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config=config))
    assert caught.value.field == field
    assert reason in caught.value.problem


def test_unsupported_preprocessing_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        build_image_tower(Model(config={**timm(image_size=[32, 64])}))
    assert "(32, 64)" in str(caught.value.found)
    assert "squares" in str(caught.value.allowed)


def test_an_unknown_architecture_suggests_close_names() -> None:
    with pytest.raises(ModelError) as caught:
        build_clip(Model(arch="ViT-B-3", weights="openai"))
    assert (caught.value.field, caught.value.found) == ("arch", "ViT-B-3")
    assert "ViT-B-32" in str(caught.value.remedy)


@pytest.mark.slow
def test_the_digest_of_a_folder_is_that_of_its_weights(tmp_path: Path) -> None:
    model = Model(arch=f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": {}}))
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        build_clip(model)
    assert caught.value.field == "arch"
    digests = set()
    for seed in (1, 2):
        made = build_clip(Model(config=tiny.CLIP), seed=seed).model
        torch.save(made.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        assert state_sha256(build_clip(model).model) == state_sha256(made)
        digests.add(weights_sha256(model))
    assert len(digests) == 2


@pytest.mark.slow
def test_a_model_of_a_hub_is_scored(tmp_path: Path) -> None:
    weights = tmp_path / "w.bin"
    torch.save(build_clip(Model(config=tiny.CLIP), seed=1).model.state_dict(), weights)
    with hub() as (url, handler):
        handler.files["someone/tiny/open_clip_config.json"] = json.dumps(
            {"model_cfg": tiny.CLIP, "preprocess_cfg": {}}
        ).encode()
        handler.files["someone/tiny/open_clip_pytorch_model.bin"] = weights.read_bytes()
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        command = ("evaluate", "hf-hub:someone/tiny", "--dataset", "digits", "--json")
        done = warm.run(*command, cwd=tmp_path, env=environment, hub=True)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["records"]
    assert (record["role"], record["images"]) == ("baseline", tiny.TEST)


def test_position_embeddings_of_another_size_are_interpolated_with_a_notice(tmp_path: Path) -> None:
    larger = {
        **tiny.CLIP,
        "vision_cfg": {**tiny.CLIP["vision_cfg"], "image_size": 32},  # type: ignore[dict-item]
        "text_cfg": {**tiny.CLIP["text_cfg"], "context_length": 12},  # type: ignore[dict-item]
    }
    torch.save(build_clip(Model(config=larger), seed=1).model.state_dict(), tmp_path / "w.pt")
    events: list[Event] = []
    build_clip(Model(config=tiny.CLIP, weights=str(tmp_path / "w.pt")), report=events.append)
    image, text = sorted(event.text for event in events if isinstance(event, Notice))
    assert "its positional_embedding is (12, 16) and the architecture's (10, 16), so it was interpolated" in text
    assert "visual.positional_embedding is (17, 32) and the architecture's (5, 32)" in image


@pytest.mark.slow
def test_an_image_tower_needs_no_tokenizer() -> None:
    """SigLIP's comes from elsewhere, through a library that comkd does not depend on."""
    tower = outline_image_tower(Model(arch="ViT-B-16-SigLIP", weights="webli"))
    assert tower.width == 768


def test_an_outline_of_a_folder_reads_no_weights(tmp_path: Path) -> None:
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"model_cfg": tiny.CLIP, "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"never read")
    outlined = outline_clip(Model(arch=f"local-dir:{tmp_path}"))
    assert outlined.preprocessing.mean == (0.1, 0.2, 0.3)
    assert next(outlined.model.parameters()).is_meta
