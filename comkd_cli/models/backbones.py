"""CLIP models and image towers from open_clip: the only place that knows it."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import _get_hf_config, load_state_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, basic_clean, canonicalize_text
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from comkd_cli.edge.images import RESAMPLING, Preprocessing
from comkd_cli.errors import ModelError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.files import sha256_of_data, sha256_of_file
from comkd_cli.models import downloads
from comkd_cli.models.config_files import config_files_sha256
from comkd_cli.models.weights import (
    READ_BY_OPEN_CLIP_ALONE,
    check_finite,
    differences,
    differences_told,
    first_line,
    read_weights,
    remedy,
    state_of,
)
from comkd_cli.recipe.model import SCHEMES, Model

# The 80 prompts of openai/CLIP's ImageNet ensemble, `{}` standing for the class name.
IMAGENET_TEMPLATES = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
# PromptSRC holds its text prompts close to the 60 others (PromptSRC, trainers/imagenet_templates.py).
_NOT_IN_PROMPTSRC = """
a jpeg corrupted photo of the {}. / a good photo of a {}. / a plushie {}. / a photo of the nice {}.
a photo of the small {}. / a photo of the weird {}. / the cartoon {}. / art of the {}. / a drawing of the {}.
a photo of the large {}. / a black and white photo of a {}. / the plushie {}. / a dark photo of a {}. / itap of a {}.
graffiti of the {}. / a toy {}. / itap of my {}. / a photo of a cool {}. / a photo of a small {}. / a tattoo of the {}.
"""
PROMPTSRC_TEMPLATES = tuple(
    template
    for template in IMAGENET_TEMPLATES
    if template not in {left_out.strip() for left_out in _NOT_IN_PROMPTSRC.replace("\n", "/").split("/")}
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
TOKENIZER_SETTINGS = {"clean", "strip_sep_token", "language"}
WORD_EMBEDDINGS = "token_embedding.weight"
# Of the files that open_clip's own releases link to, whose names end in the start of their sha256.
SHA256_IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth?$")
# A student has no text tower, but open_clip's CLIP wants one: the least that it accepts.
LEAST_TEXT_TOWER = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class Origin:
    """Which weights a model started from, to name and to recognise them again."""

    architecture: str
    weights: str | None
    """The tag or file as the recipe gives it."""
    weights_sha256: str | None
    """Of a local file; None for a tag or random weights."""
    activation: str
    """`quick_gelu` or `gelu`: weights trained with one lose accuracy silently under the other."""


@dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP, with what turns pictures and words into their inputs."""

    model: nn.Module
    """An open_clip model: encode_image, encode_text, logit_scale, visual."""
    tokenize: Callable[[Sequence[str]], Tensor]
    """From texts to token ids (texts, context)."""
    preprocessing: Preprocessing
    origin: Origin


@dataclass(frozen=True)
class ImageTower:
    """The image half of a CLIP."""

    module: nn.Module
    """From images (batch, 3, size, size) to features (batch, width), not normalised."""
    width: int
    preprocessing: Preprocessing
    origin: Origin


def outline_clip(model: Model) -> Clip:
    """Both towers on the meta device: shapes without weights, of any size, at no cost. Raises ModelError."""
    with torch.device("meta"):
        return build_clip(model, load_weights=False)


def outline_image_tower(model: Model) -> ImageTower:
    """The image tower on the meta device, as `outline_clip`. Raises ModelError."""
    with torch.device("meta"):
        return build_image_tower(model, load_weights=False)


def build_clip(model: Model, seed: int = 0, load_weights: bool = True, report: Report = ignore_event) -> Clip:
    """Both towers, with the weights of the recipe, or random ones drawn from the seed.

    Built on torch's default device. report: is told what of the weights may be wrong and can't be known.
    Raises ModelError, also for a model that can't encode an image and a prompt into one space, and for
    weights that are no numbers.
    """
    tokenize = _tokenizer(model)
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
            visual = _from_config({**model.config, "text_cfg": LEAST_TEXT_TOWER}, load_weights).visual
        if model.weights is not None and load_weights:
            _load_tower_file(visual, _weights_file(model), model, report)
        _check_loaded(visual, model, load_weights)
        _lay_out(visual)
    visual.eval()
    preprocessing = _preprocessing(visual)
    return ImageTower(visual, _width(visual, preprocessing), preprocessing, _origin(model))


def _built(model: Model, seed: int, load_weights: bool, report: Report) -> Any:
    """An open_clip model with its weights, checked, and laid out in memory as it runs best."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        built = _from_name(model, load_weights) if model.config is None else _from_config(model.config, load_weights)
    if load_weights and model.weights is not None and not _tag_of(model):
        _load_file(built, _weights_file(model), model, report)
    _check_loaded(built, model, load_weights)
    _lay_out(built.visual)
    return built


def _check_loaded(built: nn.Module, model: Model, load_weights: bool) -> None:
    if load_weights:
        named = _tag_of(model) and f"{model.arch}:{model.weights}"
        check_finite(built.state_dict(), named or model.weights or _architecture(model))


def recompute_activations(tower: nn.Module) -> None:
    """Make an image tower keep only what goes into its blocks, and compute the rest again for the backward pass.

    Raises ModelError for a tower that can't, and for one with batch norms, whose statistics would count twice.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tower.modules()):
        raise ModelError(
            "checkpointing: the image tower has batch norms, which would count each image twice; leave it off"
        )
    if isinstance(tower, VisionTransformer):
        tower.set_grad_checkpointing(True)
        return
    try:
        tower.trunk.set_grad_checkpointing(True)  # type: ignore[operator,union-attr]
    except (AttributeError, AssertionError) as error:  # what is no timm model, and timm's own refusals
        raise ModelError("checkpointing: the image tower has no support for it; leave it off") from error


def uses_all_parameters(clip: nn.Module) -> bool:
    """Whether every parameter of an open_clip model acts on its features; of others some may be for captions."""
    own = isinstance(clip, open_clip.CLIP | open_clip.CustomTextCLIP)
    return own and not any(isinstance(module, HFTextEncoder) for module in clip.modules())


def load_clip_state(clip: Clip, state: Mapping[str, Tensor], path: Path) -> None:
    """Replace a CLIP's weights by those of a file, given under the names of open_clip's CLIP.

    The table of word embeddings may be missing from them, nothing else. Raises ModelError.
    """
    own = {name: value.shape for name, value in clip.model.state_dict().items()}
    renamed = _as_named_in(own, state)
    check_finite(renamed, path)
    given = {name: value.shape for name, value in renamed.items()}
    needed = {name: shape for name, shape in own.items() if name in given or not name.endswith(WORD_EMBEDDINGS)}
    if told := differences(needed, given):
        raise ModelError(f"{path}: does not hold weights of {clip.origin.architecture}: it {told}")
    clip.model.load_state_dict(renamed, strict=False)


def _as_named_in(own: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of open_clip's CLIP, as a model has them whose text tower is a module of its own."""
    return {f"text.{name}" if f"text.{name}" in own else name: value for name, value in state.items()}


def bpe_merges(clip: Clip) -> str:
    """The merges of a CLIP's byte-pair tokenizer, a pair of symbols a line, in order. Raises ModelError."""
    if not isinstance(clip.tokenize, open_clip.SimpleTokenizer):
        raise ModelError(
            f"{clip.origin.architecture}: its tokenizer is not CLIP's own, the only one that bundles can hold; export "
            "without --text"
        )
    return "".join(f"{first} {second}\n" for first, second in clip.tokenize.bpe_ranks)


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
    if model.arch is not None and model.arch.startswith("local-dir:"):
        folder = Path(model.arch.removeprefix("local-dir:"))
        files = sorted(path for path in folder.glob("*") if path.is_file())
        return sha256_of_data({file.name: sha256_of_file(file) for file in files})
    return None


def known_architectures() -> list[str]:
    """The names that open_clip knows."""
    names: list[str] = open_clip.list_models()
    return names


def _architecture(model: Model) -> str:
    if model.arch is not None:
        return model.arch
    assert model.config is not None  # the recipe has one of the two
    vision = model.config["vision_cfg"]
    return str(vision.get("timm_model_name", "inline config")) if isinstance(vision, dict) else "inline config"


def _from_name(model: Model, load_weights: bool) -> Any:
    """A model by its name, with the weights of its tag, folder or repository; those of a file are not loaded."""
    arch = str(model.arch)
    if not arch.startswith(SCHEMES) and arch not in known_architectures():
        close = difflib.get_close_matches(arch, known_architectures(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see open_clip.list_models()"
        raise ModelError(f"{arch}: open_clip has no such architecture{hint}")
    _check_folder(model)
    _check_activation(model)
    of_file = model.weights is not None and not _tag_of(model)
    if of_file and load_weights:
        _weights_file(model)  # which is told before anything large is built
    load_weights = load_weights and not of_file
    try:
        with _quiet():
            if arch.startswith(SCHEMES) and not load_weights:
                return _from_its_config(arch)
            return open_clip.create_model(
                arch,
                pretrained=model.weights if load_weights else None,
                load_weights=load_weights,
                # What is not loaded is not fetched either.
                pretrained_text=load_weights,
                # A folder or repository without weights would pass for a model with random ones.
                require_pretrained=load_weights and model.has_weights,
                weights_only=True,
                device=torch.get_default_device(),
            )
    except Exception as error:  # open_clip, torch, pickle and the Hub's client each raise their own
        what = f"the weights {model.weights}" if model.weights and not of_file else "it"
        raise ModelError(f"{arch}: {what} could not be loaded: {_why(error, model)}") from error


def _from_its_config(arch: str) -> Any:
    """A model of a folder or repository by its config alone: open_clip would fetch its weights all the same."""
    whole = _config_of(arch)
    return _create_from(whole["model_cfg"], whole.get("preprocess_cfg", {}), from_timm=False)


def _config_of(arch: str) -> dict[str, Any]:
    """What the config of a folder or repository says, `model_cfg` and more."""
    kind, _, place = arch.partition(":")
    if kind == "local-dir":
        whole: dict[str, Any] = json.loads(Path(place, OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    else:
        whole = _get_hf_config(place)
    if "model_cfg" not in whole:
        raise ValueError(f"its {OPEN_CLIP_CONFIG} lacks model_cfg")
    return whole


def _tag_of(model: Model) -> dict[str, Any]:
    """What open_clip says of the tag in `weights`; empty for a file, and for random weights."""
    if model.arch is None or model.weights is None:
        return {}
    found: dict[str, Any] = open_clip.get_pretrained_cfg(model.arch, model.weights)
    return found


def _check_activation(model: Model) -> None:
    """Refuse a tag whose weights were trained with the other activation function."""
    if tag := _tag_of(model):
        _refuse_other_activation(model, bool(tag.get("quick_gelu", False)), f"the {model.weights} weights")


def _refuse_other_activation(model: Model, trained_quick: bool, weights: str) -> None:
    """weights: which they are, and how it is known what they were trained with."""
    if trained_quick != (_activation(model) == "quick_gelu"):
        raise ModelError(
            f"{_architecture(model)}: {weights} were trained with {'QuickGELU' if trained_quick else 'GELU'}, "
            f"and lose accuracy silently in this architecture; use {_variant(model, trained_quick)}"
        )


def _variant(model: Model, quick: bool) -> str:
    """The same architecture with QuickGELU or with GELU."""
    if model.arch is None:
        return f"quick_gelu: {str(quick).lower()} in the config"
    plain = model.arch.removesuffix("-quickgelu")
    return f"{plain}-quickgelu" if quick else plain


def _check_activation_of_file(model: Model, path: Path, held: Mapping[str, Any], report: Report) -> None:
    """The same for a file; where nothing tells what it was trained with, say so."""
    in_both = _is_in_both_variants(model)
    known = _told_activation(path, held) or (_activation_by_sha256(sha256_of_file(path)) if in_both else None)
    if known is not None:
        quick, evidence = known
        _refuse_other_activation(model, quick, f"the weights of {path} ({evidence})")
    elif in_both:
        quick = _activation(model) == "quick_gelu"
        own, other = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
        report(
            Notice(
                f"{path}: nothing tells whether these weights were trained with QuickGELU, as OpenAI's were, or with "
                f"GELU. {_architecture(model)} computes {own}; weights that were trained with {other} lose "
                f"accuracy silently in it, and need {_variant(model, not quick)}"
            )
        )


def _told_activation(path: Path, held: Mapping[str, Any]) -> tuple[bool, str] | None:
    """Whether a file's weights were trained with QuickGELU, by the file itself or a config beside it, and by which."""
    if str(held.get("format", "")).startswith("comkd-teacher") and isinstance(held.get("origin"), Mapping):
        return held["origin"].get("activation") == "quick_gelu", "as the file says"
    beside, of_transformers = path.with_name(OPEN_CLIP_CONFIG), path.with_name("config.json")
    try:
        if beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
            return bool(config["model_cfg"].get("quick_gelu", False)), f"as {beside} says"
        if of_transformers.is_file():
            config = json.loads(of_transformers.read_text(encoding="utf-8"))
            if config.get("model_type") == "clip":
                # transformers leaves out a field that has its default, quick_gelu.
                activation = (config.get("vision_config") or {}).get("hidden_act", "quick_gelu")
                return activation == "quick_gelu", f"as {of_transformers} says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a config that can't be read tells nothing
    return None


def _activation_by_sha256(sha256: str) -> tuple[bool, str] | None:
    """What open_clip's own tables say of a file with this digest: many of their addresses hold it, or its start."""
    for arch, tag in open_clip.list_pretrained():
        url = open_clip.get_pretrained_url(arch, tag)
        in_name = SHA256_IN_NAME.search(url)
        if f"/{sha256}/" in url or (in_name and sha256.startswith(in_name[1])):
            quick = bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False))
            return quick, f"by its sha256, {arch.removesuffix('-quickgelu')}:{tag}"
    return None


def _is_in_both_variants(model: Model) -> bool:
    """Whether open_clip has an architecture with either activation function; a config counts by its sizes."""
    names = known_architectures()
    both = [name for name in names if f"{name}-quickgelu" in names]
    if model.arch is not None:
        return model.arch.removesuffix("-quickgelu") in both
    assert model.config is not None  # the recipe has one of the two
    return any(_sizes(open_clip.get_model_config(name)) == _sizes(model.config) for name in both)


def _sizes(config: Mapping[str, Any]) -> list[object]:
    """What tells the image towers of known CLIPs apart, with open_clip's defaults."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        return [vision["timm_model_name"]]
    defaults = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    return [config["embed_dim"], *(vision.get(field, default) for field, default in defaults.items())]


def _activation(model: Model) -> str:
    config = model.config if model.config is not None else open_clip.get_model_config(model.arch)
    return "quick_gelu" if config and config.get("quick_gelu", False) else "gelu"


def _from_config(config: dict[str, Any], load_weights: bool) -> Any:
    """A model from an open_clip config, through open_clip's own factory.

    Its weights are random, but for a timm tower whose config asks for timm's own.
    """
    vision = config["vision_cfg"]
    from_timm = load_weights and isinstance(vision, dict) and bool(vision.get("timm_model_pretrained"))
    try:
        with _quiet():
            return _create_from(config, {}, from_timm)
    except Exception as error:  # open_clip checks a config by using it
        reason = _not_fetched(error, _named_elsewhere(Model(config=config))) or first_line(error)
        raise ModelError(f"config: open_clip can't build this model: {reason}") from error


def _create_from(config: dict[str, Any], preprocessing: dict[str, Any], from_timm: bool) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, OPEN_CLIP_CONFIG)
        file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
        return open_clip.create_model(
            f"local-dir:{folder}",
            load_weights=False,
            pretrained_image=from_timm,
            pretrained_text=False,
            device=torch.get_default_device(),
        )


def _weights_file(model: Model) -> Path:
    path = Path(str(model.weights)).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        has = (path / OPEN_CLIP_CONFIG).is_file()
        better = f"use arch: local-dir:{path} without weights" if has else _about_folder(path)
        raise ModelError(f"weights: {model.weights} is a folder; {better}")
    tags = open_clip.list_pretrained_tags_by_model(model.arch) if model.arch else []
    known = f"the tags of {model.arch} are {', '.join(tags)}" if tags else "it has no tags"
    raise ModelError(f"weights: {model.weights} is neither a file nor a tag that open_clip knows; {known}")


def _check_folder(model: Model) -> None:
    """Refuse a `local-dir:` that open_clip can't read."""
    if model.arch is not None and model.arch.startswith("local-dir:"):
        folder = Path(model.arch.removeprefix("local-dir:"))
        if not folder.is_dir():
            raise ModelError(f"{model.arch}: no such folder")
        if not (folder / OPEN_CLIP_CONFIG).is_file():
            raise ModelError(f"{model.arch}: {_about_folder(folder)}")


def _about_folder(folder: Path) -> str:
    """What to do with a folder that open_clip can't read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [str(name) for name in config.get("architectures") or [config.get("model_type", "")]]
    except (OSError, ValueError, AttributeError):
        return f"open_clip's models have an {OPEN_CLIP_CONFIG} beside their weights, and it has none"
    return (
        f"it is a model of the transformers library ({', '.join(names)}), which open_clip does not read; use the same "
        f"model as open_clip has it: a tag, or arch: hf-hub:ORG/NAME of a repository with an {OPEN_CLIP_CONFIG}"
    )


def _load_file(built: Any, path: Path, model: Model, report: Report) -> None:
    """Weights of a whole CLIP, as open_clip reads and converts them."""
    held: dict[str, Any] = {} if path.suffix in READ_BY_OPEN_CLIP_ALONE else read_weights(path)
    shapes = {name: value.shape for name, value in built.state_dict().items()}
    try:
        with _quiet():
            open_clip.load_checkpoint(built, str(path), strict=True, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each raise their own
        raise ModelError(_misfit(path, held, shapes, _architecture(model), error)) from error
    _check_activation_of_file(model, path, held, report)
    _tell_resized(path, held, shapes, report)


def _load_tower_file(visual: nn.Module, path: Path, model: Model, report: Report) -> None:
    """Weights of an image tower alone, from a file of the tower or of a whole CLIP around it."""
    held = read_weights(path)
    shapes = {name: value.shape for name, value in visual.state_dict().items()}
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
        inside = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        visual.load_state_dict(inside or state, strict=True)
    except Exception as error:  # as in _load_file
        raise ModelError(_misfit(path, held, shapes, _architecture(model), error)) from error
    _check_activation_of_file(model, path, held, report)


def _misfit(
    path: Path, held: Mapping[str, Any], shapes: Mapping[str, torch.Size], architecture: str, error: Exception
) -> str:
    """Why a file does not fit, and what to do."""
    told = remedy(path, held, shapes)
    if told is None:
        given = {name: value.shape for name, value in _as_named_in(shapes, state_of(held)).items()}
        # open_clip also stops at what it should stretch, with an assertion of its own.
        differing = differences_told(error) or (differences(shapes, given) if given else None)
        told = f"it {differing}; give the architecture that the file was made with" if differing else first_line(error)
    return f"{path}: does not hold weights of {architecture}: {told}"


def _tell_resized(path: Path, held: Mapping[str, Any], shapes: Mapping[str, torch.Size], report: Report) -> None:
    """Say where open_clip stretched the position embeddings of a file to another size of image or context."""
    for name, value in state_of(held).items():
        if not name.endswith("positional_embedding"):
            continue
        own = shapes.get(name, shapes.get(f"text.{name}"))
        if own is not None and own != value.shape:
            which = "images of another size" if name.startswith("visual.") else "prompts of another length"
            report(
                Notice(
                    f"{path}: was trained on {which}: its {name} is {tuple(value.shape)} and the architecture's "
                    f"{tuple(own)}, so it was interpolated; use the architecture that it was trained with, unless "
                    "this is meant"
                )
            )


def _why(error: Exception, model: Model) -> str:
    """Why a model by name could not be loaded, in one line."""
    if (refused := _not_fetched(error, _named_elsewhere(model))) is not None:
        return refused
    differing = differences_told(error)
    return f"its file {differing}" if differing else first_line(error)


def _named_elsewhere(model: Model) -> str | None:
    """What of a model has to be fetched if this machine does not have it; None where nothing has."""
    if model.arch is not None and model.arch.startswith("hf-hub:"):
        return f"{model.arch.removeprefix('hf-hub:')} of the Hugging Face Hub"
    if tag := _tag_of(model):
        place = tag.get("hf_hub") or tag.get("url") or str(model.weights)
        return f"{place.rstrip('/')} ({model.arch}:{model.weights})"
    config = model.config or {}
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    for part, field in ((vision, "timm_model_name"), (text, "hf_model_name"), (text, "hf_tokenizer_name")):
        if isinstance(part, dict) and part.get(field):
            return f"{part[field]} ({field})"
    return None


def _not_fetched(error: Exception, what: str | None) -> str | None:
    """That something is not in the caches of this machine and was not fetched; None where that was not the reason."""
    # open_clip only logs that a repository's weights are missing, and fails later.
    lost = downloads.are_forbidden() and str(error).startswith("Required pretrained weights")
    if what is None or not (lost or downloads.was_refused(error)):
        return None
    return (
        f"{what} is not in the cache of this machine, and what a student.pt names is not downloaded by itself; "
        "add --allow-download to download it"
    )


def _tokenizer(model: Model) -> Callable[[Sequence[str]], Tensor]:
    _check_folder(model)
    try:
        with _quiet():
            return _find_tokenizer(model)
    except Exception as error:  # open_clip, the Hub's client and transformers raise their own
        refused = _not_fetched(error, _tokenizer_elsewhere(model))
        hint = "; pip install transformers" if isinstance(error, ImportError) and not refused else ""
        raise ModelError(
            f"{_architecture(model)}: its tokenizer could not be loaded: {refused or first_line(error)}{hint}"
        ) from error


def _tokenizer_elsewhere(model: Model) -> str | None:
    """What a tokenizer has to be fetched from, as `_named_elsewhere`."""
    if model.arch is None or model.arch.startswith(SCHEMES):
        return _named_elsewhere(model)
    config = open_clip.get_model_config(model.arch) or {}
    return str(config.get("text_cfg", {}).get("hf_tokenizer_name") or f"the vocabulary of {model.arch}")


def _find_tokenizer(model: Model) -> Callable[[Sequence[str]], Tensor]:
    found: Callable[[Sequence[str]], Tensor]
    if model.arch is not None:
        if model.arch.startswith(SCHEMES):  # open_clip would guess where a repository has no config
            _check_tokenizer_settings(_config_of(model.arch)["model_cfg"].get("text_cfg", {}))
        found = open_clip.get_tokenizer(model.arch)
        return found
    text = (model.config or {})["text_cfg"]
    length, settings = int(text.get("context_length", 77)), _check_tokenizer_settings(text)
    if text.get("hf_tokenizer_name"):
        mode = text.get("tokenizer_mode")
        found = HFTokenizer(text["hf_tokenizer_name"], context_length=length, tokenizer_mode=mode, **settings)
        return found
    found = open_clip.SimpleTokenizer(context_length=length, **settings)
    return found


def _check_tokenizer_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_kwargs` of a config from somebody else, which may name how texts are cleaned and nothing more.

    transformers would take others too, and with one of them run code that comes with a tokenizer.
    """
    settings = dict(text.get("tokenizer_kwargs", {}))
    if strange := set(settings) - TOKENIZER_SETTINGS:
        raise ValueError(
            f"text_cfg.tokenizer_kwargs has {', '.join(sorted(strange))}; comkd takes "
            f"{', '.join(sorted(TOKENIZER_SETTINGS))}"
        )
    return settings


def context_length(clip: Clip) -> int:
    """How many tokens of a text the tokenizer keeps, its own marks of start and end among them."""
    tokenizer: Any = clip.tokenize
    return int(tokenizer.context_length)


def tokens_cut(clip: Clip, texts: Sequence[str]) -> list[int]:
    """How many tokens of each text the tokenizer leaves out because the context is too short, mostly 0."""
    tokenizer: Any = clip.tokenize
    room = context_length(clip)
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        # A token stands for a character at the least, so that most texts need not be encoded to be known to fit.
        short = [text.isascii() and "&" not in text and len(text) + 2 <= room for text in texts]
        lengths = [0 if fits else len(tokenizer.encode(text)) + 2 for text, fits in zip(texts, short, strict=True)]
    else:
        lengths, reserved = _lengths_by_transformers(tokenizer, texts)
        room -= reserved
    return [max(0, length - room) for length in lengths]


def _lengths_by_transformers(tokenizer: Any, texts: Sequence[str]) -> tuple[list[int], int]:
    """Tokens of each text, uncut, and the places of the context that are kept for marks which they lack."""
    if isinstance(tokenizer, SigLipTokenizer):
        cleaned = [canonicalize_text(basic_clean(text)) for text in texts]
    else:
        cleaned = [tokenizer.clean_fn(text) for text in texts]
    bare = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # which adds three marks of its own
    encoded = tokenizer.tokenizer(cleaned, add_special_tokens=not bare, padding=False, truncation=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]], 3 if bare else 0


def _check_towers(clip: Clip) -> None:
    """Send a blank image and a prompt through both towers: what can't work should be told before hours pass."""
    try:
        with torch.no_grad():
            tokens = clip.tokenize(["a photo of a thing."]).to(torch.get_default_device())
            words = clip.model.encode_text(tokens)  # type: ignore[operator]
        text_width = int(words.shape[-1])
    except Exception as error:  # whatever a config that does not fit raises, at whatever depth
        raise ModelError(
            f"{clip.origin.architecture}: its text tower can't encode a prompt: {first_line(error)}"
        ) from error
    image_width = _width(clip.model.visual, clip.preprocessing)  # type: ignore[arg-type]
    if image_width != text_width:
        raise ModelError(
            f"{clip.origin.architecture}: image features have {image_width} dimensions and text features {text_width}"
        )


def _width(visual: nn.Module, preprocessing: Preprocessing) -> int:
    """Of the features, found by asking: towers do not all say it."""
    side = preprocessing.size
    try:
        with torch.no_grad():
            features = visual(torch.zeros(1, 3, side, side))
        _batch, width = features.shape
        return int(width)
    except Exception as error:  # as in _check_towers
        raise ModelError(
            f"the image tower can't turn {side} x {side} images into one feature each: {first_line(error)}"
        ) from error


def _lay_out(visual: nn.Module) -> None:
    """Convolutional towers keep channels last in memory, which CPUs and tensor cores run faster."""
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
            f"pre-processing to image_size {size!r}, resize {mode}, {interpolation} is not supported; comkd resizes "
            f"to squares of whole pixels, by shortest or squash, with {' or '.join(RESAMPLING)}"
        )
    return Preprocessing(sides[0], tuple(settings["mean"]), tuple(settings["std"]), interpolation, mode)


def _origin(model: Model) -> Origin:
    return Origin(_architecture(model), model.weights, weights_sha256(model), _activation(model))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's log: it warns of random weights, which are wanted here, on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def state_sha256(module: nn.Module) -> str:
    """A digest of a module's tensors, by name and content, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
