import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from comkd_cli.errors import ModelError
from comkd_cli.models.backbones import build_clip, tokens_cut
from comkd_cli.recipe.model import Model
from tests import siglip, tiny


@pytest.mark.parametrize(
    ("arch", "library"), [("ViT-B-16-SigLIP", "tokenizers"), ("xlm-roberta-base-ViT-B-32", "transformers")]
)
def test_an_architecture_whose_tokenizer_is_not_installed_is_explained(
    arch: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=f"the tokenizer of {arch} could not be loaded") as caught:
        build_clip(Model(arch=arch))
    assert caught.value.field == "arch"
    assert caught.value.remedy == f"pip install {library}"


def test_a_tokenizer_whose_files_say_too_little_needs_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError) as caught:
        build_clip(Model(config=siglip.config(siglip.write_tokenizer(tmp_path, pad_token=None))))
    assert (caught.value.field, caught.value.remedy) == ("config", "pip install transformers")


def test_a_tokenizer_of_a_config_has_the_settings_that_the_config_gives_it() -> None:
    text = {**tiny.CLIP["text_cfg"], "tokenizer_kwargs": {"clean": "canonicalize"}}  # type: ignore[dict-item]
    built = build_clip(Model(config={**tiny.CLIP, "text_cfg": text}))
    theirs = open_clip.SimpleTokenizer(context_length=10, clean="canonicalize")
    assert torch.equal(built.tokenize(["A cat, a dog!"]), theirs(["A cat, a dog!"]))
    assert tokens_cut(built, ["one! two! three! four! five!", "one two three four five six seven eight nine"]) == [0, 1]


def test_configs_with_other_settings_have_other_tokenizers_and_equal_ones_the_same() -> None:
    def tokenizer(**changes: object) -> object:
        text = {**tiny.CLIP["text_cfg"], **changes}  # type: ignore[dict-item]
        return build_clip(Model(config={**tiny.CLIP, "text_cfg": text})).tokenize

    assert tokenizer() is tokenizer()
    assert tokenizer(context_length=9)(["a cat"]).shape == (1, 9)  # type: ignore[operator]
    assert tokenizer()(["a cat"]).shape == (1, 10)  # type: ignore[operator]


def test_a_config_cannot_make_a_tokenizer_run_code(tmp_path: Path) -> None:
    unsafe = {"tokenizer_kwargs": {"trust_remote_code": True}, "hf_tokenizer_name": "someone/tokenizer"}
    config = {**tiny.CLIP, "text_cfg": {**tiny.CLIP["text_cfg"], **unsafe}}  # type: ignore[dict-item]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    for model, field in ((Model(config=config), "config"), (Model(arch=f"local-dir:{tmp_path}"), "arch")):
        with pytest.raises(ModelError, match="tokenizer_kwargs has trust_remote_code") as caught:
            build_clip(model)
        assert caught.value.field == field
