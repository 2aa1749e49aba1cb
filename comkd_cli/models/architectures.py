"""Architectures, configs and pretrained tags of open_clip, and the files that a model's weights come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import _get_hf_config

from comkd_cli.errors import ModelError
from comkd_cli.files import sha256_of_data, sha256_of_file
from comkd_cli.models import downloads
from comkd_cli.models.config_files import config_files_sha256
from comkd_cli.recipe.model import SCHEMES, Model

OPEN_CLIP_CONFIG = "open_clip_config.json"
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"
ALLOW_DOWNLOAD = "add --allow-download to download it"


def known_architectures() -> list[str]:
    """The names that open_clip knows."""
    names: list[str] = open_clip.list_models()
    return names


def architecture_name(model: Model) -> str:
    """`arch`, or for a config its timm tower, for messages and records."""
    if model.arch is not None:
        return model.arch
    assert model.config is not None  # the recipe has one of the two
    vision = model.config["vision_cfg"]
    return str(vision.get("timm_model_name", "inline config")) if isinstance(vision, dict) else "inline config"


def pretrained_tag(model: Model) -> dict[str, Any]:
    """open_clip's entry for the tag in `weights`; empty for a file, and for random weights."""
    if model.arch is None or model.weights is None:
        return {}
    found: dict[str, Any] = open_clip.get_pretrained_cfg(model.arch, model.weights)
    return found


def read_config(arch: str) -> dict[str, Any]:
    """The config of a folder or repository, `model_cfg` and more. Raises ValueError if it lacks `model_cfg`."""
    if arch.startswith(LOCAL_DIR):
        path = Path(arch.removeprefix(LOCAL_DIR), OPEN_CLIP_CONFIG)
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = _get_hf_config(arch.removeprefix(HUB))
    if "model_cfg" not in config:
        raise ValueError(f"its {OPEN_CLIP_CONFIG} lacks model_cfg")
    return config


def activation(model: Model) -> str:
    """The activation function of an architecture: `quick_gelu` or `gelu`."""
    config = model.config if model.config is not None else open_clip.get_model_config(model.arch)
    return "quick_gelu" if config and config.get("quick_gelu", False) else "gelu"


def weights_file(model: Model) -> Path:
    """The local file in `weights`. Raises ModelError if it is neither a file nor a tag."""
    path = Path(str(model.weights)).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / OPEN_CLIP_CONFIG).is_file():
            remedy = f"use arch: {LOCAL_DIR}{path} without weights"
            raise ModelError("is a folder, not a file", field="weights", found=model.weights, remedy=remedy)
        problem, remedy = _unsupported_folder(path)
        raise ModelError(f"is a folder, and {problem}", field="weights", found=model.weights, remedy=remedy)
    tags = open_clip.list_pretrained_tags_by_model(model.arch) if model.arch else []
    raise ModelError(
        f"is neither a file nor a tag of {architecture_name(model)}",
        field="weights",
        found=model.weights,
        allowed=tags or "a file, since the architecture has no tags",
    )


def named_model(argument: str) -> Model:
    """The model of ARCH:WEIGHTS, or of a name that brings its weights, such as hf-hub:REPOSITORY. Raises ModelError."""
    if argument.startswith(SCHEMES):
        return Model(arch=argument)
    arch, colon, weights = argument.partition(":")
    if not colon or not weights:
        raise ModelError(
            f"{argument}: is neither a student.pt nor ARCH:WEIGHTS",
            remedy="use one of these, such as ViT-B-32:laion2b_s34b_b79k",
        )
    return Model(arch=arch, weights=weights)


def weights_sha256(model: Model) -> str | None:
    """A digest of the local files that a model is loaded from: its weights, and folders that its config names.

    None for tags and random weights.
    """
    weights, named = _weights_sha256(model), config_files_sha256(model.config)
    return weights if named is None else sha256_of_data([weights, named])


def _weights_sha256(model: Model) -> str | None:
    path = Path(model.weights).expanduser() if model.weights else None
    if path is not None and path.is_file():
        return sha256_of_file(path)
    if model.arch is not None and model.arch.startswith(LOCAL_DIR):
        folder = Path(model.arch.removeprefix(LOCAL_DIR))
        files = sorted(path for path in folder.glob("*") if path.is_file())
        return sha256_of_data({file.name: sha256_of_file(file) for file in files})
    return None


def check_folder(model: Model) -> None:
    """Raise ModelError for a `local-dir:` that open_clip does not read."""
    if model.arch is None or not model.arch.startswith(LOCAL_DIR):
        return
    folder = Path(model.arch.removeprefix(LOCAL_DIR))
    if not folder.is_dir():
        raise ModelError("no such folder", path=folder, field="arch")
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        problem, remedy = _unsupported_folder(folder)
        raise ModelError(problem, path=folder, field="arch", remedy=remedy)


def _unsupported_folder(folder: Path) -> tuple[str, str]:
    """Why open_clip does not read a folder, and the remedy."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [str(name) for name in config.get("architectures") or [config.get("model_type", "")]]
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"it has no {OPEN_CLIP_CONFIG}", f"use a folder with an {OPEN_CLIP_CONFIG} beside the weights"
    if {"CLIPModel", "SiglipModel"} & set(names):
        return (
            f"it holds a model of the transformers library ({', '.join(names)}), not an open_clip folder",
            f"use the open_clip architecture of the same sizes with weights: {folder / 'model.safetensors'}",
        )
    return (
        f"it holds a model of the transformers library ({', '.join(names)}), which open_clip does not read",
        f"use the same model from open_clip: a tag, or arch: {HUB}ORG/NAME of a repository with an {OPEN_CLIP_CONFIG}",
    )


def download_source(model: Model) -> str | None:
    """The repository or address that a model is downloaded from unless it is cached; None if there is none."""
    if model.arch is not None and model.arch.startswith(HUB):
        return f"{model.arch.removeprefix(HUB)} of the Hugging Face Hub"
    if tag := pretrained_tag(model):
        address = tag.get("hf_hub") or tag.get("url") or str(model.weights)
        return f"{address.rstrip('/')} ({model.arch}:{model.weights})"
    config = model.config or {}
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    for part, field in ((vision, "timm_model_name"), (text, "hf_model_name"), (text, "hf_tokenizer_name")):
        if isinstance(part, dict) and part.get(field):
            return f"{part[field]} ({field})"
    return None


def download_refusal(error: Exception, source: str | None) -> str | None:
    """Says that `source` is not cached and was not downloaded; None if that did not cause the error.

    The remedy is ALLOW_DOWNLOAD.
    """
    # open_clip only logs that a repository's weights are missing, and fails later.
    missing = downloads.are_forbidden() and str(error).startswith("Required pretrained weights")
    if source is None or not (missing or downloads.was_refused(error)):
        return None
    return f"{source} is not cached on this machine; by default, comkd downloads nothing that a student.pt refers to"
