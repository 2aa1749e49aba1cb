"""QuickGELU or GELU: weights that were trained with one silently lose accuracy in an architecture with the other."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

from comkd_cli.errors import ModelError
from comkd_cli.events import Notice, Report
from comkd_cli.files import sha256_of_file
from comkd_cli.models.architectures import (
    OPEN_CLIP_CONFIG,
    activation,
    architecture_name,
    known_architectures,
    pretrained_tag,
)
from comkd_cli.recipe.model import Model

# Names of the files in open_clip's own releases end in the first digits of their sha256.
SHA256_IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth?$")


def check_activation_of_tag(model: Model) -> None:
    """Raise ModelError for a tag whose weights were trained with the other activation function."""
    if tag := pretrained_tag(model):
        _refuse_other(model, bool(tag.get("quick_gelu", False)), f"the {model.weights} weights")


def check_activation_of_file(model: Model, path: Path, held: Mapping[str, Any], report: Report) -> None:
    """Raise ModelError for a file whose weights were trained with the other activation function.

    held: the content of the file. If nothing records the activation function and open_clip has the architecture
    with both, report a Notice.
    """
    ambiguous = _has_both_variants(model)
    found = _recorded_activation(path, held) or (activation_by_sha256(sha256_of_file(path)) if ambiguous else None)
    if found is not None:
        quick, evidence = found
        _refuse_other(model, quick, f"the weights of {path} ({evidence})")
    elif ambiguous:
        quick = activation(model) == "quick_gelu"
        own, other = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
        report(
            Notice(
                f"{path}: does not record whether its weights were trained with QuickGELU, as OpenAI's were, or with "
                f"GELU. {architecture_name(model)} uses {own}; weights that were trained with {other} silently lose "
                f"accuracy with it, and need {_variant(model, not quick)}"
            )
        )


def activation_by_sha256(sha256: str) -> tuple[bool, str] | None:
    """Whether open_clip's tables list a file with this digest as trained with QuickGELU, and under which name.

    Many addresses in the tables hold the digest, or its first digits. None for any other file.
    """
    for arch, tag in open_clip.list_pretrained():
        url = open_clip.get_pretrained_url(arch, tag)
        in_name = SHA256_IN_NAME.search(url)
        if f"/{sha256}/" in url or (in_name and sha256.startswith(in_name[1])):
            quick = bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False))
            return quick, f"by its sha256, {arch.removesuffix('-quickgelu')}:{tag}"
    return None


def _refuse_other(model: Model, trained_quick: bool, weights: str) -> None:
    """weights: names them, and the evidence for what they were trained with."""
    if trained_quick != (activation(model) == "quick_gelu"):
        raise ModelError(
            f"{weights} were trained with {'QuickGELU' if trained_quick else 'GELU'}, and silently lose accuracy in "
            "this architecture",
            field="config" if model.arch is None else "arch",
            found=architecture_name(model),
            remedy=f"use {_variant(model, trained_quick)}",
        )


def _variant(model: Model, quick: bool) -> str:
    """The same architecture with QuickGELU or with GELU."""
    if model.arch is None:
        return f"quick_gelu: {str(quick).lower()} in the config"
    plain = model.arch.removesuffix("-quickgelu")
    return f"{plain}-quickgelu" if quick else plain


def _recorded_activation(path: Path, held: Mapping[str, Any]) -> tuple[bool, str] | None:
    """Whether the file or a config beside it records QuickGELU, and which of them does; None if neither does."""
    if str(held.get("format", "")).startswith("comkd-teacher") and isinstance(held.get("origin"), Mapping):
        return held["origin"].get("activation") == "quick_gelu", "as the file says"
    of_open_clip, of_transformers = path.with_name(OPEN_CLIP_CONFIG), path.with_name("config.json")
    try:
        if of_open_clip.is_file():
            config = json.loads(of_open_clip.read_text(encoding="utf-8"))
            return bool(config["model_cfg"].get("quick_gelu", False)), f"as {of_open_clip} says"
        if of_transformers.is_file():
            config = json.loads(of_transformers.read_text(encoding="utf-8"))
            if config.get("model_type") == "clip":
                # transformers leaves out a field that has its default, quick_gelu.
                hidden_act = (config.get("vision_config") or {}).get("hidden_act", "quick_gelu")
                return hidden_act == "quick_gelu", f"as {of_transformers} says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # an unreadable config is not evidence
    return None


def _has_both_variants(model: Model) -> bool:
    """Whether open_clip has the architecture with either activation function; a config is compared by its sizes."""
    names = known_architectures()
    both = [name for name in names if f"{name}-quickgelu" in names]
    if model.arch is not None:
        return model.arch.removesuffix("-quickgelu") in both
    assert model.config is not None  # the recipe has one of the two
    return any(_sizes(open_clip.get_model_config(name)) == _sizes(model.config) for name in both)


def _sizes(config: Mapping[str, Any]) -> list[object]:
    """The sizes that distinguish the image towers of known CLIPs, with open_clip's defaults."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        return [vision["timm_model_name"]]
    defaults = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    return [config["embed_dim"], *(vision.get(field, default) for field, default in defaults.items())]
