"""The tokenizer of a text encoder, as it is written into a bundle."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from comkd_cli.bundles.text_tokenizer import JsonTokenizerData, tokenizer_data
from comkd_cli.errors import ExportError, ModelError
from comkd_cli.models.backbones import Clip, bpe_merges, build_clip
from comkd_cli.recipe.model import Model
from tests import siglip


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    return build_clip(Model(config=siglip.config(siglip.write_tokenizer(tmp_path / "tokenizer"))))


def test_the_tokenizer_of_a_siglip_is_its_file_with_the_rules(clip: Clip, tmp_path: Path) -> None:
    data = tokenizer_data(clip, siglip.CONTEXT)
    assert isinstance(data, JsonTokenizerData)
    fields = data.write(tmp_path)
    assert fields == {"merges": None, "tokenizer": {"file": "tokenizer.json", **asdict(data.rules)}}
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == siglip.definition()


def test_tokens_that_differ_from_the_teachers_stop_the_export(clip: Clip) -> None:
    data = tokenizer_data(clip, siglip.CONTEXT)
    assert isinstance(data, JsonTokenizerData)
    data.check(clip.tokenize, ["red fox", "two cats!"])
    other = replace(data, rules=replace(data.rules, clean="lower"))
    with pytest.raises(ExportError) as caught:
        other.check(clip.tokenize, ["red fox", "two cats!"])
    assert (caught.value.path, caught.value.found) == ("tokenizer.json", "'two cats!'")


def test_a_siglip_has_no_merges_to_prune(clip: Clip) -> None:
    with pytest.raises(ModelError) as caught:
        bpe_merges(clip)
    assert "--text" in str(caught.value.remedy)


def test_a_tokenizer_that_is_no_file_is_refused(clip: Clip) -> None:
    with pytest.raises(ModelError) as caught:
        tokenizer_data(replace(clip, tokenize=lambda texts: torch.ones(len(texts), 2)), 2)
    assert caught.value.remedy == "export without --text"
