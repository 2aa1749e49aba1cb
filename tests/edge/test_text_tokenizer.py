"""The tokenizer of a bundle, by its manifest."""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from comkd_cli.edge.json_tokenizer import JsonTokenizer, TokenizerRules
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.edge.text_tokenizer import read_tokenizer
from tests import siglip

ENTRY = {"file": "tokenizer.json", **asdict(TokenizerRules("canonicalize", 1))}


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    """The manifest of a bundle with the tokenizer of a SigLIP, whose file is beside it."""
    content = siglip.definition().encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    text = {"context_length": 6, "merges": None, "tokenizer": ENTRY}
    return {"files": {"tokenizer.json": {"sha256": hashlib.sha256(content).hexdigest()}}, "text": text}


def test_the_tokenizer_is_the_one_of_the_file(tmp_path: Path, manifest: dict[str, Any]) -> None:
    found = read_tokenizer(tmp_path, json.loads(json.dumps(manifest)), manifest["text"])
    assert isinstance(found, JsonTokenizer)
    assert found("A fox!").tolist() == [[*(siglip.IDS[piece] for piece in ("▁a", "▁fox")), 1, 1, 1, 1]]


def test_without_the_library_the_remedy_is_to_install_it(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BundleProblem) as caught:
        read_tokenizer(tmp_path, manifest, manifest["text"])
    assert (caught.value.path, caught.value.field) == (tmp_path / "manifest.json", "text.tokenizer")
    assert caught.value.remedy == "pip install tokenizers"


def test_a_changed_file_is_refused(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleProblem) as caught:
        read_tokenizer(tmp_path, manifest, manifest["text"])
    assert caught.value.path == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("changes", [{"clean": "upper"}, {"clean": []}, {"pad": 2**40}, {"pad": None}, {"zeroed": "x"}])
def test_a_damaged_entry_is_an_error_that_callers_expect(
    tmp_path: Path, manifest: dict[str, Any], changes: dict[str, object]
) -> None:
    text = {**manifest["text"], "tokenizer": {**ENTRY, **changes}}
    with pytest.raises((KeyError, TypeError, ValueError)):
        read_tokenizer(tmp_path, manifest, text)
