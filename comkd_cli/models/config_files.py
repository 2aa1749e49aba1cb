"""Local files that a model config names. open_clip loads them beside the weights: a changed file is another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comkd_cli.files import sha256_of_data, sha256_of_file

# The fields by which a config names a model or a tokenizer elsewhere, perhaps as a folder of this machine.
FIELDS = (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name"), ("text_cfg", "hf_tokenizer_name"))


def config_files_sha256(config: Mapping[str, Any] | None) -> str | None:
    """A digest of the files in the local folders that a config names; None if it names none."""
    found: dict[str, str] = {}
    for section, field in FIELDS:
        value = (config or {}).get(section, {}).get(field)
        folder = Path(str(value).removeprefix("local-dir:")).expanduser()
        if value and folder.is_dir():
            found |= {f"{field}/{path.name}": sha256_of_file(path) for path in folder.glob("*") if path.is_file()}
    return sha256_of_data(found) if found else None
