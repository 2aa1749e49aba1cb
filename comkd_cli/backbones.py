"""CLIP models and image towers from open_clip: the only place that knows it."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from comkd_cli.errors import ModelError
from comkd_cli.files import sha256_of_data, sha256_of_file
from comkd_cli.predictor import RESAMPLING, Preprocessing
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


def build_clip(model: Model, seed: int = 0, load_weights: bool = True) -> Clip:
    """Both towers, with the weights of the recipe, or random ones drawn from the seed.

    Built on torch's default device. Raises ModelError, also for a model that can't encode an image and a
    prompt into one space.
    """
    tokenize = _tokenizer(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if model.config is not None:
            built = _from_config(model.config, load_weights)
        else:
            built = _from_name(model, load_weights)
    if model.config is not None and model.weights is not None and load_weights:
        _load_file(built, _weights_file(model), _architecture(model))
    _lay_out(built.visual)
    clip = Clip(built.eval(), tokenize, _preprocessing(built.visual), _origin(model))
    _check_towers(clip)
    return clip


def build_image_tower(model: Model, seed: int = 0, load_weights: bool = True) -> ImageTower:
    """The image tower alone, with the weights of the recipe, or random ones drawn from the seed.

    Raises ModelError.
    """
    if model.config is None or "text_cfg" in model.config:
        clip = build_clip(model, seed, load_weights)
        visual: nn.Module = clip.model.visual  # type: ignore[assignment]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            visual = _from_config({**model.config, "text_cfg": LEAST_TEXT_TOWER}, load_weights).visual
        if model.weights is not None and load_weights:
            _load_tower_file(visual, _weights_file(model), _architecture(model))
    _lay_out(visual.eval())
    preprocessing = _preprocessing(visual)
    return ImageTower(visual, _width(visual, preprocessing), preprocessing, _origin(model))


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
    held = set(clip.model.state_dict())
    renamed = {f"text.{name}" if f"text.{name}" in held else name: value for name, value in state.items()}
    try:
        absent, strange = clip.model.load_state_dict(renamed, strict=False)
    except RuntimeError as error:  # of shapes
        raise ModelError(f"{path}: does not hold weights of {clip.origin.architecture}: {_shapes(error)}") from error
    odd = strange + [name for name in absent if not name.endswith("token_embedding.weight")]
    if odd:
        raise ModelError(f"{path}: does not hold weights of {clip.origin.architecture}: {', '.join(odd[:5])} differ")


def bpe_merges(clip: Clip) -> str:
    """The merges of a CLIP's byte-pair tokenizer, a pair of symbols a line, in order. Raises ModelError."""
    if not isinstance(clip.tokenize, open_clip.SimpleTokenizer):
        raise ModelError(
            f"{clip.origin.architecture}: its tokenizer is not CLIP's own, the only one that bundles can hold; export "
            "without --text"
        )
    return "".join(f"{first} {second}\n" for first, second in clip.tokenize.bpe_ranks)


def weights_sha256(model: Model) -> str | None:
    """A digest of the local file or folder that a model's weights come from; None for tags and random ones."""
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
    arch = str(model.arch)
    if not arch.startswith(SCHEMES) and arch not in known_architectures():
        close = difflib.get_close_matches(arch, known_architectures(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see open_clip.list_models()"
        raise ModelError(f"{arch}: open_clip has no such architecture{hint}")
    _check_activation(model)
    weights = model.weights
    if load_weights and weights is not None and not open_clip.get_pretrained_cfg(arch, weights):
        weights = str(_weights_file(model))
    try:
        with _quiet():
            return open_clip.create_model(
                arch,
                pretrained=weights if load_weights else None,
                load_weights=load_weights,
                # A folder or repository without weights would pass for a model with random ones.
                require_pretrained=load_weights and model.has_weights,
                weights_only=True,
                device=torch.get_default_device(),
            )
    except Exception as error:  # open_clip, torch, pickle and the Hub's client each raise their own
        raise ModelError(f"{arch}: can't load {weights or 'its weights'}: {_first_line(error)}") from error


def _check_activation(model: Model) -> None:
    tag = open_clip.get_pretrained_cfg(model.arch, model.weights) if model.weights else None
    if not tag:
        return
    trained_quick = bool(tag.get("quick_gelu", False))
    if trained_quick != (_activation(model) == "quick_gelu"):
        arch = str(model.arch)
        better = f"{arch}-quickgelu" if trained_quick else arch.removesuffix("-quickgelu")
        raise ModelError(
            f"{arch}: the {model.weights} weights were trained with {'QuickGELU' if trained_quick else 'GELU'}, "
            f"and lose accuracy silently in this architecture; use {better}"
        )


def _activation(model: Model) -> str:
    config = model.config if model.config is not None else open_clip.get_model_config(model.arch)
    return "quick_gelu" if config and config.get("quick_gelu", False) else "gelu"


def _from_config(config: dict[str, Any], load_weights: bool) -> Any:
    """A model from an open_clip config, through open_clip's own factory.

    Its weights are random, but for a timm tower whose config asks for timm's own.
    """
    vision = config["vision_cfg"]
    from_timm = load_weights and isinstance(vision, dict) and bool(vision.get("timm_model_pretrained"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "open_clip_config.json")
        try:
            file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
            with _quiet():
                return open_clip.create_model(
                    f"local-dir:{folder}",
                    load_weights=False,
                    pretrained_image=from_timm,
                    pretrained_text=False,
                    device=torch.get_default_device(),
                )
        except Exception as error:  # open_clip checks a config by using it
            raise ModelError(f"config: open_clip can't build this model: {_first_line(error)}") from error


def _weights_file(model: Model) -> Path:
    path = Path(str(model.weights)).expanduser()
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(model.arch) if model.arch else []
        known = f"the tags of {model.arch} are {', '.join(tags)}" if tags else "it has no tags"
        raise ModelError(f"weights: {model.weights} is neither a file nor a tag that open_clip knows; {known}")
    return path


def _load_file(built: nn.Module, path: Path, architecture: str) -> None:
    try:
        open_clip.load_checkpoint(built, str(path), strict=True, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each raise their own
        raise ModelError(f"{path}: does not hold weights of {architecture}: {_first_line(error)}") from error


def _load_tower_file(visual: nn.Module, path: Path, architecture: str) -> None:
    """Weights of an image tower alone, from a file of the tower or of a whole CLIP around it."""
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
        inside = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        visual.load_state_dict(inside or state, strict=True)
    except Exception as error:  # as in _load_file
        raise ModelError(f"{path}: does not hold weights of {architecture}: {_first_line(error)}") from error


def _tokenizer(model: Model) -> Callable[[Sequence[str]], Tensor]:
    try:
        with _quiet():
            return _find_tokenizer(model)
    except Exception as error:  # open_clip, the Hub's client and transformers raise their own
        hint = "; pip install transformers" if isinstance(error, ImportError) else ""
        raise ModelError(f"{_architecture(model)}: its tokenizer can't be had: {_first_line(error)}{hint}") from error


def _find_tokenizer(model: Model) -> Callable[[Sequence[str]], Tensor]:
    found: Callable[[Sequence[str]], Tensor]
    if model.arch is not None:
        found = open_clip.get_tokenizer(model.arch)
        return found
    text = (model.config or {})["text_cfg"]
    length = int(text.get("context_length", 77))
    if text.get("hf_tokenizer_name"):
        found = HFTokenizer(text["hf_tokenizer_name"], context_length=length)
        return found
    found = open_clip.SimpleTokenizer(context_length=length)
    return found


def _check_towers(clip: Clip) -> None:
    """Send a blank image and a prompt through both towers: what can't work should be told before hours pass."""
    try:
        with torch.no_grad():
            tokens = clip.tokenize(["a photo of a thing."]).to(torch.get_default_device())
            words = clip.model.encode_text(tokens)  # type: ignore[operator]
        text_width = int(words.shape[-1])
    except Exception as error:  # whatever a config that does not fit raises, at whatever depth
        raise ModelError(
            f"{clip.origin.architecture}: its text tower can't encode a prompt: {_first_line(error)}"
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
            f"the image tower can't turn {side} x {side} images into one feature each: {_first_line(error)}"
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


def _shapes(error: Exception) -> str:
    """The first of the tensors that do not fit; torch's message starts with a line that names none."""
    lines = [line.strip() for line in str(error).splitlines() if "shape" in line]
    return lines[0] if lines else _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Weights only load failed"):
        return "it is no checkpoint of plain tensors"  # torch would go on to advise loading it unsafely
    return lines[0] if lines else type(error).__name__
