"""Tokenizers of folders and repositories, read without transformers."""

from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from open_clip.tokenizer import HFTokenizer

from comkd_cli.errors import ModelError
from comkd_cli.models import downloads
from comkd_cli.models.architectures import ALLOW_DOWNLOAD
from comkd_cli.models.backbones import build_clip, context_length, json_definition, tokens_cut
from comkd_cli.models.json_tokenizers import (
    HostTokenizer,
    NamedTokenizer,
    NeedsTransformers,
    definition_of,
    read_named_tokenizer,
)
from comkd_cli.recipe.model import Model
from tests import siglip

TEXTS = ["a photo of a red fox.", "The TWO dogs!", "", "a_cat: number 7", "größe", "a photo of the number two" * 3]


def named(folder: Path, clean: str = "canonicalize", strip_sep_token: bool = False) -> NamedTokenizer:
    return NamedTokenizer(str(folder), siglip.CONTEXT, clean, strip_sep_token)


def test_the_special_tokens_are_those_of_the_config(tmp_path: Path) -> None:
    read = read_named_tokenizer(named(siglip.write_tokenizer(tmp_path)))
    assert asdict(read.rules) == {"clean": "canonicalize", "pad": 1, "pad_left": False, "zeroed": None}
    changes = {"pad_token": {"content": "<pad>"}, "sep_token": "</s>", "padding_side": "left"}
    siglip.write_tokenizer(tmp_path, **changes)
    rules = read_named_tokenizer(named(tmp_path, "lower", strip_sep_token=True)).rules
    assert asdict(rules) == {"clean": "lower", "pad": 0, "pad_left": True, "zeroed": 1}
    siglip.write_tokenizer(tmp_path, add_bos_token=False, add_eos_token=True)
    assert read_named_tokenizer(named(tmp_path)).rules == read.rules


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pad_token": None}, "pad_token"),
        ({"pad_token": "[PAD]"}, "pad_token"),
        ({"tokenizer_class": "GemmaTokenizer"}, "padding_side"),
        ({"add_bos_token": True}, "add_bos_token"),
        ({"add_eos_token": False}, "add_eos_token"),
    ],
)
def test_files_that_do_not_say_what_transformers_does_are_refused(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    siglip.write_tokenizer(tmp_path, **changes)
    with pytest.raises(NeedsTransformers, match=problem):
        read_named_tokenizer(named(tmp_path))


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NeedsTransformers, match=r"has no tokenizer\.json"):
        read_named_tokenizer(named(tmp_path))


def test_a_siglip_has_the_tokenizer_of_its_config(tmp_path: Path) -> None:
    clip = build_clip(Model(config=siglip.config(siglip.write_tokenizer(tmp_path))))
    assert context_length(clip) == siglip.CONTEXT
    assert clip.tokenize(["a red, fox!"])[0, :5].tolist() == [
        *(siglip.IDS[piece] for piece in ("▁a", "▁red", "▁fox")),
        *(1, 1),
    ]
    assert tokens_cut(clip, ["a fox", "a " * 20]) == [0, 21 - siglip.CONTEXT]
    definition, rules = json_definition(clip)
    assert torch.equal(HostTokenizer(definition, siglip.CONTEXT, rules)(TEXTS), clip.tokenize(TEXTS))


def test_a_repository_that_is_not_cached_is_not_downloaded_for_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = siglip.config(Path("timm/ViT-B-16-SigLIP"))
    for model in (Model(arch="ViT-B-16-SigLIP", weights="webli"), Model(config=config)):
        with downloads.forbidden(), pytest.raises(ModelError, match="timm/ViT-B-16-SigLIP") as caught:
            build_clip(model)
        assert caught.value.remedy == ALLOW_DOWNLOAD


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_it_equals_open_clips_tokenizer_of_transformers(tmp_path: Path, clean: str) -> None:
    pytest.importorskip("transformers")
    siglip.write_tokenizer(tmp_path, sep_token="</s>")
    for strip in (False, True):
        theirs = HFTokenizer(str(tmp_path), context_length=siglip.CONTEXT, clean=clean, strip_sep_token=strip)
        ours = read_named_tokenizer(named(tmp_path, clean, strip))
        assert torch.equal(ours(TEXTS), theirs(TEXTS))
        written = definition_of(theirs)
        assert written is not None
        assert written[1] == ours.rules
        assert torch.equal(HostTokenizer(written[0], siglip.CONTEXT, written[1])(TEXTS), theirs(TEXTS))
