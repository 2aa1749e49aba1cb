"""The activation function that weights were trained with: recorded, recognised or reported as unknown."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from comkd_cli.errors import ModelError
from comkd_cli.events import Event, Notice
from comkd_cli.models.activations import activation_by_sha256
from comkd_cli.models.backbones import build_clip, build_image_tower, known_architectures
from comkd_cli.recipe.model import Model
from tests import tiny

ONE_TOWER = {key: value for key, value in tiny.CLIP.items() if key != "text_cfg"}


@pytest.fixture
def both_variants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An architecture that open_clip has with GELU and, as its own, with QuickGELU."""
    factory: Any = importlib.import_module("open_clip.factory")
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "Tiny.json").write_text(json.dumps(tiny.CLIP))
    (configs / "Tiny-quickgelu.json").write_text(json.dumps({**tiny.CLIP, "quick_gelu": True}))
    open_clip.add_model_config(configs)
    assert {"Tiny", "Tiny-quickgelu"} <= set(known_architectures())
    return "Tiny"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "files" / "clip.pt"
    path.parent.mkdir()
    torch.save(build_clip(Model(config=tiny.CLIP), seed=1).model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("fields", "computes", "instead"),
    [
        ({"arch": "Tiny"}, "GELU", "Tiny-quickgelu"),
        ({"arch": "Tiny-quickgelu"}, "QuickGELU", "need Tiny"),
        ({"config": tiny.CLIP}, "GELU", "quick_gelu: true in the config"),
        ({"config": {**ONE_TOWER, "quick_gelu": True}}, "QuickGELU", "quick_gelu: false in the config"),
    ],
)
def test_an_unrecorded_activation_is_reported(
    both_variants: str, file: Path, fields: dict[str, Any], computes: str, instead: str
) -> None:
    events: list[Event] = []
    build_image_tower(Model(**fields, weights=str(file)), report=events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert str(file) in notice.text
    assert f" uses {computes};" in notice.text
    assert notice.text.endswith(instead)


@pytest.mark.slow
def test_other_architectures_and_random_weights_cause_no_notice(file: Path) -> None:
    events: list[Event] = []
    build_clip(Model(config=tiny.CLIP, weights=str(file)), report=events.append)  # of sizes that open_clip has not
    build_image_tower(Model(arch="RN50"), report=events.append)
    assert events == []


CONFIGS_BESIDE = {
    "open_clip_config.json": {"model_cfg": {**tiny.CLIP, "quick_gelu": True}},
    "config.json": {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS_BESIDE)
def test_a_config_beside_the_file_records_its_activation(both_variants: str, file: Path, name: str) -> None:
    (file.parent / name).write_text(json.dumps(CONFIGS_BESIDE[name]))
    events: list[Event] = []
    with pytest.raises(ModelError, match=rf"{name} says\) were trained with QuickGELU") as caught:
        build_clip(Model(arch="Tiny", weights=str(file)), report=events.append)
    error = caught.value
    assert (error.field, error.found, error.remedy) == ("arch", "Tiny", "use Tiny-quickgelu")
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config=tiny.CLIP, weights=str(file)), report=events.append)
    assert (caught.value.field, caught.value.remedy) == ("config", "use quick_gelu: true in the config")
    build_clip(Model(arch="Tiny-quickgelu", weights=str(file)), report=events.append)
    assert events == []


def test_transformers_leaves_its_default_out_of_a_config(both_variants: str, file: Path) -> None:
    (file.parent / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelError) as caught:
        build_clip(Model(arch="Tiny", weights=str(file)))
    assert caught.value.remedy == "use Tiny-quickgelu"
    config = {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}
    (file.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        build_clip(Model(arch="Tiny-quickgelu", weights=str(file)))
    assert caught.value.remedy == "use Tiny"


@pytest.mark.parametrize("content", ["{", "[]", '{"model_cfg": 3}'])
def test_an_unreadable_config_is_no_evidence(both_variants: str, file: Path, content: str) -> None:
    (file.parent / "open_clip_config.json").write_text(content)
    events: list[Event] = []
    build_clip(Model(arch="Tiny", weights=str(file)), report=events.append)
    assert len(events) == 1


@pytest.mark.parametrize("place", ["https://openaipublic.azureedge.net/clip/models/{whole}/T.pt", "v0.2/t-{start}.pt"])
def test_a_file_of_open_clips_tables_is_recognised_by_its_digest(
    both_variants: str, file: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    pretrained: Any = importlib.import_module("open_clip.pretrained")
    tag = {"url": place.format(whole=digest, start=digest[:8]), "hf_hub": "", "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny", {"theirs": tag})
    events: list[Event] = []
    with pytest.raises(ModelError, match=r"by its sha256, Tiny:theirs\) were trained with QuickGELU"):
        build_clip(Model(arch="Tiny", weights=str(file)), report=events.append)
    build_clip(Model(arch="Tiny-quickgelu", weights=str(file)), report=events.append)
    assert events == []


def test_the_digests_of_open_clips_tables_are_found() -> None:
    """OpenAI's and open_clip's own files, as their addresses have them today."""
    openai = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert activation_by_sha256(openai) == (True, "by its sha256, ViT-B-32:openai")
    assert activation_by_sha256("af8dbd0c" + 56 * "0") == (False, "by its sha256, ViT-B-32:laion2b_e16")
    assert activation_by_sha256("46683a32" + 56 * "0") == (True, "by its sha256, ViT-B-32:laion400m_e32")
    assert activation_by_sha256(64 * "0") is None


def test_a_teacher_that_comkd_trained_records_its_activation(both_variants: str, file: Path) -> None:
    state = torch.load(file, weights_only=True)
    torch.save({"format": "comkd-teacher/1", "origin": {"activation": "quick_gelu"}, "state_dict": state}, file)
    with pytest.raises(ModelError, match="as the file says"):
        build_clip(Model(arch="Tiny", weights=str(file)))
