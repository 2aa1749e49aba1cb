"""Weights from local files into models that open_clip has built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from torch import Tensor, nn

from comkd_cli.errors import ModelError
from comkd_cli.events import Notice, Report
from comkd_cli.models.activations import check_activation_of_file
from comkd_cli.models.architectures import architecture_name
from comkd_cli.models.clip import Clip
from comkd_cli.models.transformers_clip import as_open_clip, is_transformers_clip
from comkd_cli.models.transformers_siglip import is_transformers_siglip, siglip_as_open_clip
from comkd_cli.models.weights import (
    READ_BY_OPEN_CLIP_ALONE,
    check_finite,
    diagnose,
    differences,
    differences_in_error,
    first_line,
    numbers_unread,
    read_weights,
    tensors_of,
)
from comkd_cli.recipe.model import Model
from comkd_cli.runtime.quiet import logging_disabled

WORD_EMBEDDINGS = "token_embedding.weight"


def load_clip_file(built: Any, path: Path, model: Model, report: Report) -> None:
    """Load a file of a whole CLIP, as open_clip reads and converts it, or one of transformers. Raises ModelError."""
    held: dict[str, Any] = {} if path.suffix in READ_BY_OPEN_CLIP_ALONE else read_weights(path)
    shapes = _shapes(built)
    converted = _converted(held)
    try:
        if converted is not None:
            built.load_state_dict(_as_named_in(shapes, converted), strict=True)
        else:
            with logging_disabled(), numbers_unread():
                open_clip.load_checkpoint(built, str(path), strict=True, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each raise their own
        raise _mismatch_error(path, converted or held, shapes, architecture_name(model), error) from error
    check_activation_of_file(model, path, held, report)
    _report_interpolation(path, held, shapes, report)


def load_tower_file(visual: nn.Module, path: Path, model: Model, report: Report) -> None:
    """Load an image tower from a file of the tower or of a whole CLIP, also one of transformers. Raises ModelError."""
    held = read_weights(path)
    shapes = _shapes(visual)
    converted = _converted(held)
    try:
        with numbers_unread():
            state = converted or load_state_dict(str(path), device="cpu", weights_only=True)
        inside = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        visual.load_state_dict(inside or state, strict=True)
    except Exception as error:  # as in load_clip_file
        raise _mismatch_error(path, converted or held, shapes, architecture_name(model), error) from error
    check_activation_of_file(model, path, held, report)


def load_clip_state(clip: Clip, state: Mapping[str, Tensor], path: Path) -> None:
    """Replace a CLIP's weights by those of a file, given under the names of open_clip's CLIP.

    The table of word embeddings may be missing from them, nothing else. Raises ModelError.
    """
    own = _shapes(clip.model)
    renamed = _as_named_in(own, state)
    check_finite(renamed, path)
    given = {name: value.shape for name, value in renamed.items()}
    needed = {name: shape for name, shape in own.items() if name in given or not name.endswith(WORD_EMBEDDINGS)}
    if found := differences(needed, given):
        raise ModelError(f"does not hold weights of {clip.origin.architecture}: it {found}", path=path)
    clip.model.load_state_dict(renamed, strict=False)


def _converted(held: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a file of transformers' CLIPModel or SiglipModel by open_clip's names; None for any other file."""
    tensors = tensors_of(held)
    if is_transformers_siglip(tensors):
        return siglip_as_open_clip(tensors)
    return as_open_clip(tensors) if is_transformers_clip(tensors) else None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def _as_named_in(own: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a model whose text tower is a module of its own, if it is one."""
    return {f"text.{name}" if f"text.{name}" in own else name: value for name, value in state.items()}


def _mismatch_error(
    path: Path, held: Mapping[str, Any], shapes: Mapping[str, torch.Size], architecture: str, error: Exception
) -> ModelError:
    """The error for a file that a model does not load, with the reason and the remedy."""
    problem = f"does not hold weights of {architecture}"
    if (diagnosis := diagnose(path, held, shapes)) is not None:
        return ModelError(f"{problem}: {diagnosis.problem}", path=path, remedy=diagnosis.remedy)
    given = {name: value.shape for name, value in _as_named_in(shapes, tensors_of(held)).items()}
    # For tensors that it should interpolate, open_clip may fail with an assertion of its own.
    found = differences_in_error(error) or (differences(shapes, given) if given else None)
    if found is None:
        return ModelError(f"{problem}: {first_line(error)}", path=path)
    return ModelError(f"{problem}: it {found}", path=path, remedy="use the architecture of these weights")


def _report_interpolation(
    path: Path, held: Mapping[str, Any], shapes: Mapping[str, torch.Size], report: Report
) -> None:
    """Report position embeddings that open_clip interpolated to another image size or context length."""
    for name, value in tensors_of(held).items():
        if not name.endswith("positional_embedding"):
            continue
        own = shapes.get(name, shapes.get(f"text.{name}"))
        if own is not None and own != value.shape:
            inputs = "images of another size" if name.startswith("visual.") else "prompts of another length"
            report(
                Notice(
                    f"{path}: was trained on {inputs}: its {name} is {tuple(value.shape)} and the architecture's "
                    f"{tuple(own)}, so it was interpolated; use the architecture that it was trained with, unless "
                    "this is intended"
                )
            )
