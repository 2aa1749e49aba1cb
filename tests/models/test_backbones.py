import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from comkd_cli.errors import ModelError
from comkd_cli.events import Event, Notice
from comkd_cli.models.backbones import (
    build_clip,
    build_image_tower,
    known_architectures,
    outline_clip,
    outline_image_tower,
    state_sha256,
    tokens_cut,
    weights_sha256,
)
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
    with pytest.raises(ModelError, match="its tokenizer could not be loaded"):
        build_clip(Model(arch="ViT-B-16-SigLIP", weights="webli"))


def test_a_folder_brings_its_own_weights_and_is_told_apart_by_them(tmp_path: Path) -> None:
    model = Model(arch=f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.CLIP, "preprocess_cfg": {}}))
    with pytest.raises(ModelError, match="could not be loaded"):
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


ONE_TOWER = {key: value for key, value in tiny.CLIP.items() if key != "text_cfg"}


@pytest.mark.parametrize(
    ("fields", "computes", "instead"),
    [
        ({"arch": "Tiny"}, "GELU", "Tiny-quickgelu"),
        ({"arch": "Tiny-quickgelu"}, "QuickGELU", "need Tiny"),
        ({"config": tiny.CLIP}, "GELU", "quick_gelu: true in the config"),
        ({"config": {**ONE_TOWER, "quick_gelu": True}}, "QuickGELU", "quick_gelu: false in the config"),
    ],
)
def test_an_activation_that_nothing_tells_is_said_so(
    both_variants: str, file: Path, fields: dict[str, Any], computes: str, instead: str
) -> None:
    events: list[Event] = []
    build_image_tower(Model(**fields, weights=str(file)), report=events.append)
    (told,) = events
    assert isinstance(told, Notice)
    assert str(file) in told.text
    assert f" computes {computes};" in told.text
    assert told.text.endswith(instead)


def test_other_architectures_and_random_weights_are_not_worth_a_notice(file: Path) -> None:
    events: list[Event] = []
    build_clip(Model(config=tiny.CLIP, weights=str(file)), report=events.append)  # of sizes that open_clip has not
    build_image_tower(Model(arch="RN50"), report=events.append)
    assert events == []


CONFIGS_BESIDE = {
    "open_clip_config.json": {"model_cfg": {**tiny.CLIP, "quick_gelu": True}},
    "config.json": {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}},
}


@pytest.mark.parametrize("name", CONFIGS_BESIDE)
def test_a_config_beside_the_file_tells_its_activation(both_variants: str, file: Path, name: str) -> None:
    (file.parent / name).write_text(json.dumps(CONFIGS_BESIDE[name]))
    events: list[Event] = []
    with pytest.raises(ModelError, match=rf"{name} says\) were trained with QuickGELU.*use Tiny-quickgelu"):
        build_clip(Model(arch="Tiny", weights=str(file)), report=events.append)
    with pytest.raises(ModelError, match="quick_gelu: true in the config"):
        build_clip(Model(config=tiny.CLIP, weights=str(file)), report=events.append)
    build_clip(Model(arch="Tiny-quickgelu", weights=str(file)), report=events.append)
    assert events == []


def test_transformers_leaves_its_default_out_of_a_config(both_variants: str, file: Path) -> None:
    (file.parent / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelError, match="trained with QuickGELU"):
        build_clip(Model(arch="Tiny", weights=str(file)))
    config = {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}
    (file.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"trained with GELU.*use Tiny$"):
        build_clip(Model(arch="Tiny-quickgelu", weights=str(file)))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_cfg": 3}'])
def test_a_config_that_can_not_be_read_tells_nothing(both_variants: str, file: Path, content: str) -> None:
    (file.parent / "open_clip_config.json").write_text(content)
    events: list[Event] = []
    build_clip(Model(arch="Tiny", weights=str(file)), report=events.append)
    assert len(events) == 1


@pytest.mark.parametrize("place", ["https://openaipublic.azureedge.net/clip/models/{whole}/T.pt", "v0.2/t-{start}.pt"])
def test_a_file_of_open_clips_own_tables_is_known_by_its_digest(
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
    from comkd_cli.models.backbones import _activation_by_sha256

    openai = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert _activation_by_sha256(openai) == (True, "by its sha256, ViT-B-32:openai")
    assert _activation_by_sha256("af8dbd0c" + 56 * "0") == (False, "by its sha256, ViT-B-32:laion2b_e16")
    assert _activation_by_sha256("46683a32" + 56 * "0") == (True, "by its sha256, ViT-B-32:laion400m_e32")
    assert _activation_by_sha256(64 * "0") is None


def test_a_teacher_that_comkd_trained_says_its_activation(both_variants: str, file: Path) -> None:
    state = torch.load(file, weights_only=True)
    torch.save({"format": "comkd-teacher/1", "origin": {"activation": "quick_gelu"}, "state_dict": state}, file)
    with pytest.raises(ModelError, match="as the file says"):
        build_clip(Model(arch="Tiny", weights=str(file)))


def test_weights_for_other_images_or_contexts_are_taken_with_a_word(tmp_path: Path) -> None:
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


def test_a_tokenizer_of_a_config_has_the_settings_that_the_config_gives_it() -> None:
    text = {**tiny.CLIP["text_cfg"], "tokenizer_kwargs": {"clean": "canonicalize"}}  # type: ignore[dict-item]
    built = build_clip(Model(config={**tiny.CLIP, "text_cfg": text}))
    theirs = open_clip.SimpleTokenizer(context_length=10, clean="canonicalize")
    assert torch.equal(built.tokenize(["A cat, a dog!"]), theirs(["A cat, a dog!"]))
    assert tokens_cut(built, ["one! two! three! four! five!", "one two three four five six seven eight nine"]) == [0, 1]


def test_a_config_can_not_ask_a_tokenizer_to_run_its_own_code(tmp_path: Path) -> None:
    asking = {"tokenizer_kwargs": {"trust_remote_code": True}, "hf_tokenizer_name": "someone/tokenizer"}
    config = {**tiny.CLIP, "text_cfg": {**tiny.CLIP["text_cfg"], **asking}}  # type: ignore[dict-item]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    for model in (Model(config=config), Model(arch=f"local-dir:{tmp_path}")):
        with pytest.raises(ModelError, match="tokenizer_kwargs has trust_remote_code; comkd takes clean, language"):
            build_clip(model)


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
