"""CLIPs and image towers, built by open_clip and checked before they are used.

Other rooms import the names of `__all__` from here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from comkd_cli.edge.images import RESAMPLING, Preprocessing
from comkd_cli.errors import ModelError
from comkd_cli.events import Report, ignore_event
from comkd_cli.files import temporary_folder
from comkd_cli.models.activations import check_activation_of_tag
from comkd_cli.models.architectures import (
    ALLOW_DOWNLOAD,
    OPEN_CLIP_CONFIG,
    activation,
    architecture_name,
    check_folder,
    download_refusal,
    download_source,
    known_architectures,
    pretrained_tag,
    read_config,
    weights_file,
    weights_sha256,
)
from comkd_cli.models.clip import Clip, ImageTower, Origin
from comkd_cli.models.loading import load_clip_file, load_clip_state, load_tower_file
from comkd_cli.models.templates import IMAGENET_TEMPLATES, PROMPTSRC_TEMPLATES
from comkd_cli.models.tokenizers import (
    bpe_merges,
    context_length,
    has_bpe_merges,
    json_definition,
    load_tokenizer,
    tokens_cut,
)
from comkd_cli.models.weights import check_finite, differences_in_error, first_line
from comkd_cli.recipe.model import SCHEMES, Model
from comkd_cli.runtime.quiet import logging_disabled

__all__ = [
    "IMAGENET_TEMPLATES",
    "PROMPTSRC_TEMPLATES",
    "Clip",
    "ImageTower",
    "Origin",
    "bpe_merges",
    "build_clip",
    "build_image_tower",
    "context_length",
    "has_bpe_merges",
    "json_definition",
    "known_architectures",
    "load_clip_state",
    "outline_clip",
    "outline_image_tower",
    "recompute_activations",
    "state_sha256",
    "tensors_sha256",
    "tokens_cut",
    "uses_all_parameters",
    "weights_sha256",
]

# A student has no text tower, but open_clip's CLIP needs one: the smallest that it accepts.
SMALLEST_TEXT_TOWER = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


def outline_clip(model: Model) -> Clip:
    """Both towers on the meta device, without weights and at no cost for any size. Raises ModelError."""
    with torch.device("meta"):
        return build_clip(model, load_weights=False)


def outline_image_tower(model: Model) -> ImageTower:
    """The image tower on the meta device, as `outline_clip`. Raises ModelError."""
    with torch.device("meta"):
        return build_image_tower(model, load_weights=False)


def build_clip(model: Model, seed: int = 0, load_weights: bool = True, report: Report = ignore_event) -> Clip:
    """Both towers, with the weights of the recipe, or random ones drawn from the seed.

    Built on torch's default device. report: gets a Notice for what may be wrong with the weights and cannot be
    checked. Raises ModelError, also for a model that does not encode an image and a prompt into one space, and for
    weights with NaN or infinite values.
    """
    tokenize = load_tokenizer(model)
    built = _built(model, seed, load_weights, report)
    clip = Clip(built.eval(), tokenize, _preprocessing(built.visual), _origin(model))
    _check_towers(clip)
    return clip


def build_image_tower(
    model: Model, seed: int = 0, load_weights: bool = True, report: Report = ignore_event
) -> ImageTower:
    """The image tower alone, with the weights of the recipe, or random ones drawn from the seed.

    report: as in `build_clip`. Raises ModelError.
    """
    if model.config is None or "text_cfg" in model.config:
        visual: nn.Module = _built(model, seed, load_weights, report).visual
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            visual = _from_config({**model.config, "text_cfg": SMALLEST_TEXT_TOWER}, load_weights).visual
        if model.weights is not None and load_weights:
            load_tower_file(visual, weights_file(model), model, report)
        _check_loaded(visual, model, load_weights)
        _set_memory_format(visual)
    visual.eval()
    preprocessing = _preprocessing(visual)
    return ImageTower(visual, _width(visual, preprocessing), preprocessing, _origin(model))


def recompute_activations(tower: nn.Module) -> None:
    """Make an image tower keep only the inputs of its blocks, and compute the rest again for the backward pass.

    Raises ModelError for a tower without support for it, and for one with batch norms, whose statistics would count
    each image twice.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tower.modules()):
        raise ModelError(
            "the image tower has batch norms, whose statistics would count each image twice",
            field="checkpointing",
            remedy="set checkpointing: false",
        )
    if isinstance(tower, VisionTransformer):
        tower.set_grad_checkpointing(True)
        return
    try:
        tower.trunk.set_grad_checkpointing(True)  # type: ignore[operator,union-attr]
    except (AttributeError, AssertionError) as error:  # not a timm model, or timm refuses it
        raise ModelError(
            "the image tower does not support it", field="checkpointing", remedy="set checkpointing: false"
        ) from error


def uses_all_parameters(clip: nn.Module) -> bool:
    """Whether every parameter of an open_clip model affects its features; others may have some for captions."""
    own = isinstance(clip, open_clip.CLIP | open_clip.CustomTextCLIP)
    return own and not any(isinstance(module, HFTextEncoder) for module in clip.modules())


def state_sha256(module: nn.Module) -> str:
    """A digest of a module's tensors, by name and content, independent of the file that they came from."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A digest of tensors, by name and content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _built(model: Model, seed: int, load_weights: bool, report: Report) -> Any:
    """An open_clip model with its weights, checked, in its fastest memory format."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        built = _from_name(model, load_weights) if model.config is None else _from_config(model.config, load_weights)
    if load_weights and model.weights is not None and not pretrained_tag(model):
        load_clip_file(built, weights_file(model), model, report)
    _check_loaded(built, model, load_weights)
    _set_memory_format(built.visual)
    return built


def _from_name(model: Model, load_weights: bool) -> Any:
    """A model by its name, with the weights of its tag, folder or repository; those of a file are not loaded."""
    arch = str(model.arch)
    if not arch.startswith(SCHEMES) and arch not in known_architectures():
        close = difflib.get_close_matches(arch, known_architectures(), n=3)
        remedy = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
        raise ModelError("open_clip has no such architecture", field="arch", found=arch, remedy=remedy)
    check_folder(model)
    check_activation_of_tag(model)
    of_file = model.weights is not None and not pretrained_tag(model)
    if of_file and load_weights:
        weights_file(model)  # fails before anything large is built
    load_weights = load_weights and not of_file
    try:
        with logging_disabled():  # open_clip warns of random weights, which are intended here
            if arch.startswith(SCHEMES) and not load_weights:
                return _from_its_config(arch)
            return open_clip.create_model(
                arch,
                pretrained=model.weights if load_weights else None,
                load_weights=load_weights,
                # Weights that are not loaded are not downloaded either.
                pretrained_text=load_weights,
                # Otherwise a folder or repository without weights would give random ones.
                require_pretrained=load_weights and model.has_weights,
                weights_only=True,
                device=torch.get_default_device(),
            )
    except Exception as error:  # open_clip, torch, pickle and the Hub's client each raise their own
        raise _loading_error(model, of_file, error) from error


def _loading_error(model: Model, of_file: bool, error: Exception) -> ModelError:
    """The error for a model by name that could not be loaded, with the reason in one line."""
    of_tag = model.weights is not None and not of_file
    what = f"{model.arch}:{model.weights}" if of_tag else model.arch
    refusal = download_refusal(error, download_source(model))
    found = differences_in_error(error)
    reason = refusal or (f"its file {found}" if found else first_line(error))
    return ModelError(
        f"{what} could not be loaded: {reason}",
        field="weights" if of_tag else "arch",
        remedy=ALLOW_DOWNLOAD if refusal else None,
    )


def _from_its_config(arch: str) -> Any:
    """A model of a folder or repository from its config alone; open_clip would download its weights regardless."""
    config = read_config(arch)
    return _create(config["model_cfg"], config.get("preprocess_cfg", {}), from_timm=False)


def _from_config(config: dict[str, Any], load_weights: bool) -> Any:
    """A model from an open_clip config, through open_clip's own factory.

    Its weights are random, except in a timm tower whose config has timm's own.
    """
    vision = config["vision_cfg"]
    from_timm = load_weights and isinstance(vision, dict) and bool(vision.get("timm_model_pretrained"))
    try:
        with logging_disabled():
            return _create(config, {}, from_timm)
    except Exception as error:  # open_clip checks a config by using it
        refusal = download_refusal(error, download_source(Model(config=config)))
        raise ModelError(
            f"open_clip could not build this model: {refusal or first_line(error)}",
            field="config",
            remedy=ALLOW_DOWNLOAD if refusal else None,
        ) from error


def _create(config: dict[str, Any], preprocessing: dict[str, Any], from_timm: bool) -> Any:
    with temporary_folder() as folder:
        file = folder / OPEN_CLIP_CONFIG
        file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
        return open_clip.create_model(
            f"local-dir:{folder}",
            load_weights=False,
            pretrained_image=from_timm,
            pretrained_text=False,
            device=torch.get_default_device(),
        )


def _check_loaded(built: nn.Module, model: Model, load_weights: bool) -> None:
    if load_weights:
        named = pretrained_tag(model) and f"{model.arch}:{model.weights}"
        check_finite(built.state_dict(), named or model.weights or architecture_name(model))


def _check_towers(clip: Clip) -> None:
    """Encode a blank image and a prompt, so that a model that cannot work fails now and not hours later."""
    architecture = clip.origin.architecture
    try:
        with torch.no_grad():
            tokens = clip.tokenize(["a photo of a thing."]).to(torch.get_default_device())
            words = clip.model.encode_text(tokens)  # type: ignore[operator]
        text_width = int(words.shape[-1])
    except Exception as error:  # a config that does not fit may raise anything, at any depth
        raise ModelError(f"the text tower of {architecture} failed on a prompt: {first_line(error)}") from error
    image_width = _width(clip.model.visual, clip.preprocessing)  # type: ignore[arg-type]
    if image_width != text_width:
        raise ModelError(
            f"the towers of {architecture} do not share a space: image features have {image_width} dimensions and text "
            f"features {text_width}"
        )


def _width(visual: nn.Module, preprocessing: Preprocessing) -> int:
    """The width of the features, measured on a blank image: not all towers have it as an attribute."""
    side = preprocessing.size
    try:
        with torch.no_grad():
            features = visual(torch.zeros(1, 3, side, side))
        _batch, width = features.shape
        return int(width)
    except Exception as error:  # as in _check_towers
        raise ModelError(
            f"the image tower failed on an image of {side} x {side} pixels: {first_line(error)}"
        ) from error


def _set_memory_format(visual: nn.Module) -> None:
    """Use channels-last memory in convolutional towers, which CPUs and tensor cores run faster."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in visual.modules())
    if convolutions > 1:  # a vision transformer has one, which cuts the patches
        visual.to(memory_format=torch.channels_last)


def _preprocessing(visual: Any) -> Preprocessing:
    settings = visual.preprocess_cfg
    size = settings["size"]
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    mode, interpolation = settings["resize_mode"], settings["interpolation"]
    square = all(isinstance(side, int) and side > 0 for side in sides) and len(set(sides)) == 1
    if not square or mode not in ("shortest", "squash") or interpolation not in RESAMPLING:
        raise ModelError(
            "its pre-processing is not supported",
            found=f"image_size {size!r}, resize {mode}, {interpolation}",
            allowed=f"squares of whole pixels, resized by shortest or squash, with {' or '.join(RESAMPLING)}",
        )
    return Preprocessing(sides[0], tuple(settings["mean"]), tuple(settings["std"]), interpolation, mode)


def _origin(model: Model) -> Origin:
    return Origin(architecture_name(model), model.weights, weights_sha256(model), activation(model))
