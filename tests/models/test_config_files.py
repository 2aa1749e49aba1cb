from pathlib import Path
from typing import Any

import pytest

from comkd_cli.models.backbones import weights_sha256
from comkd_cli.models.config_files import config_files_sha256
from comkd_cli.recipe.model import Model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/vocab.json").write_text("{}")
    return tmp_path / "tokenizer"


def config(section: str, field: str, value: object) -> dict[str, Any]:
    return {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}} | {section: {field: value}}


@pytest.mark.parametrize(
    ("section", "field", "prefix"),
    [
        ("text_cfg", "hf_tokenizer_name", ""),
        ("text_cfg", "hf_model_name", ""),
        ("vision_cfg", "timm_model_name", "local-dir:"),
    ],
)
def test_a_changed_file_of_a_folder_that_a_config_names_changes_the_digest(
    folder: Path, section: str, field: str, prefix: str
) -> None:
    model = Model(config=config(section, field, f"{prefix}{folder}"))
    before = weights_sha256(model)
    assert before is not None
    assert weights_sha256(model) == before
    (folder / "vocab.json").write_text('{"a": 1}')
    assert weights_sha256(model) != before


def test_the_weights_and_the_folders_of_a_config_both_count(folder: Path, tmp_path: Path) -> None:
    named, weights = config("text_cfg", "hf_tokenizer_name", str(folder)), tmp_path / "w.pt"
    weights.write_bytes(b"one")
    digests = {weights_sha256(Model(config=named)), weights_sha256(Model(config=named, weights=str(weights)))}
    weights.write_bytes(b"two")
    digests.add(weights_sha256(Model(config=named, weights=str(weights))))
    assert len(digests) == 3


@pytest.mark.parametrize("value", ["gpt2", "org/name", None, 3])
def test_names_that_are_no_folders_here_have_no_digest(value: object) -> None:
    assert config_files_sha256(config("text_cfg", "hf_tokenizer_name", value)) is None
    assert weights_sha256(Model(config=config("vision_cfg", "timm_model_name", value))) is None
