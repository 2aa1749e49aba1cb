"""Checkpoints as PromptSRC and PromptKD publish them, read without running anything from them; here their teachers.

Such a file is a torch.save of {state_dict, epoch, optimizer, scheduler, val_result}, whose scheduler entry
holds objects of classes that need not be installed.
"""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from comkd_cli.errors import CheckpointError
from comkd_cli.models.weights import check_finite, check_stored, is_torchscript


class Inert:
    """Stands for an object of any class that a file names: it holds the object's state, and runs nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Inert:
        """Takes and ignores any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Store the state, without reading it."""
        self.state = state


def _unread(*_arguments: object) -> Inert:
    return Inert()


# What may be called while a file is read: constructors of tensors and plain containers, which have no other effect.
# numpy's numbers and arrays, as in val_result, are skipped.
HARMLESS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("_codecs", "encode"): _unread,
    ("numpy", "dtype"): _unread,
    **{
        (f"numpy.{core}.multiarray", name): _unread for core in ("core", "_core") for name in ("scalar", "_reconstruct")
    },
}
# Types that a file names, such as a defaultdict's factory, and that hold no data.
PLAIN_TYPES = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list": list,
    "dict": dict,
    "tuple": tuple,
    "set": set,
}
DEEP_PROMPT = re.compile(r"transformer\.resblocks\.(\d+)\.VPT_shallow")
START_EMBEDDING, WORD_EMBEDDINGS = "prompt_learner.token_prefix", "prompt_learner.token_suffix"
COMPARED_CLASSES = 64  # their tokens are enough to recognise a table of word embeddings
IGNORED = (START_EMBEDDING, WORD_EMBEDDINGS, "prompt_learner.ZS_image_encoder.")
IMAGE_ENCODER = "image_encoder."
PROJECTOR = "VPT_image_trans."  # of a student that PromptKD distilled
DATA_PARALLEL = "module."  # what torch's DataParallel puts in front of every name
MOST_CONTEXT_WORDS = 8  # after the learned tokens, that are compared with `teacher.context`


@dataclass(frozen=True)
class ReleasedTeacher:
    """A prompted CLIP, as its file stores it."""

    clip_state: dict[str, Tensor]
    """CLIP's own weights, float32, under open_clip's names; the table of word embeddings may be missing."""
    vision_tokens: Tensor
    """(depth, tokens, width); (1, 0, width) for a file without prompts in the image encoder."""
    text_tokens: Tensor
    """(depth, tokens, width)."""
    start_embedding: Tensor | None
    """(1, width): of the start token in the CLIP that the prompts were learned on; None if the file lacks it."""
    word_embeddings: Tensor | None
    """(words, width): of tokens of class prompts in that CLIP, each once; None if the file lacks them."""
    following: Tensor | None = None
    """(classes, words, width): of the first tokens after the learned ones, of some classes; None as above."""


class _Refused(pickle.UnpicklingError):
    """The file requests a call that reading it does not need."""


# The unpickler in C cannot restrict what is called.
_PurePythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]


class _InertUnpickler(_PurePythonUnpickler):  # type: ignore[misc]
    """Reads a pickle; every global but a few becomes an inert class, and only those few can be called.

    torch.load puts its own storages on top.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in HARMLESS:
            return HARMLESS[module, name]
        if module == "builtins" and name in PLAIN_TYPES:
            return PLAIN_TYPES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return type(name.rpartition(".")[2], (Inert,), {"origin": f"{module}.{name}"})

    def _instantiate(self, made: Any, args: Any) -> None:
        raise _Refused(f"it calls {_name_of(made)}")

    def load_reduce(self) -> None:
        called = self.stack[-2]
        if called not in HARMLESS.values():
            raise _Refused(f"it calls {_name_of(called)}")
        super().load_reduce()

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (Inert, Tensor, dict)):
            raise _Refused(f"it changes {_name_of(self.stack[-2])}")
        super().load_build()

    dispatch: ClassVar[dict[int, Any]] = {
        **_PurePythonUnpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
    }


def _name_of(called: Any) -> str:
    return str(getattr(called, "origin", getattr(called, "__name__", called)))


def _load(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


# What torch.load uses as `pickle`.
INERT_PICKLE = SimpleNamespace(
    __name__="inert", Unpickler=_InertUnpickler, load=_load, UnpicklingError=pickle.UnpicklingError
)


def read_released(path: Path) -> ReleasedTeacher:
    """The teacher of a PromptSRC or PromptKD checkpoint.

    The depth of the prompts is read from the file. Raises CheckpointError, naming the file and what it lacks.
    """
    found = read_state(path)
    if any(name.startswith(PROJECTOR) for name in found):
        raise CheckpointError(
            "is a student that PromptKD distilled, and not a teacher",
            path=path,
            remedy="read it with `comkd import-student`",
        )
    state = as_float({name: value for name, value in found.items() if not name.startswith(IGNORED)}, path)
    start, words = (_embeddings(found.get(name), path, name) for name in (START_EMBEDDING, WORD_EMBEDDINGS))
    text = deep_prompts(state, path, "prompt_learner.ctx", "text_encoder.")
    vision = vision_prompts(state, path)
    check_finite(state, path, CheckpointError)
    clip_state = {}
    for name, value in state.items():
        if name.startswith(IMAGE_ENCODER):
            clip_state[f"visual.{name.removeprefix(IMAGE_ENCODER)}"] = value
        else:
            clip_state[name.removeprefix("text_encoder.")] = value
    following = found.get(WORD_EMBEDDINGS)
    if following is not None:
        following = following[:COMPARED_CLASSES, :MOST_CONTEXT_WORDS].float()
    return ReleasedTeacher(clip_state, vision, text, start, words, following)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a released checkpoint by name, without a prefix of DataParallel. Raises CheckpointError."""
    checkpoint = _read_inert(path)
    # dict's own methods: a file may have set attributes of the same names.
    found = dict.get(checkpoint, "state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in dict.values(found)):
        raise CheckpointError("is not a PromptSRC checkpoint: it has no `state_dict` of tensors", path=path)
    state = {str(name): value for name, value in dict.items(found)}
    if state and all(name.startswith(DATA_PARALLEL) for name in state):
        state = {name.removeprefix(DATA_PARALLEL): value for name, value in state.items()}
    return state


def as_float(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors as float32. Raises CheckpointError for one that states more than it stores."""
    check_stored(state, path, CheckpointError)
    try:
        return {name: value.float() for name, value in state.items()}
    except RuntimeError as error:
        raise CheckpointError("holds a damaged tensor", path=path, found=str(error).splitlines()[0]) from error


def vision_prompts(state: dict[str, Tensor], path: Path) -> Tensor:
    """Remove the prompts of the image encoder from the state and return them, (depth, tokens, width).

    PromptSRC's wrapper has none with a vision depth of 0: then (1, 0, width), as a tower with prompts of no tokens.
    """
    if f"{IMAGE_ENCODER}VPT" in state:
        return deep_prompts(state, path, f"{IMAGE_ENCODER}VPT", IMAGE_ENCODER)
    embedding = state.get(f"{IMAGE_ENCODER}class_embedding")
    if embedding is None or embedding.ndim != 1:
        raise CheckpointError(
            "is not a checkpoint of PromptSRC or PromptKD: it has no vision transformer as image encoder", path=path
        )
    return embedding.new_empty(1, 0, len(embedding))


def _embeddings(held: Tensor | None, path: Path, name: str) -> Tensor | None:
    """The distinct token embeddings that a file stores for each class, (tokens, width) float32."""
    if held is None:
        return None
    if held.ndim != 3 or not held.numel() or not held.is_floating_point():
        raise CheckpointError(
            f"{name} has the wrong shape or dtype",
            path=path,
            found=f"{tuple(held.shape)} {held.dtype}",
            allowed="(classes, tokens, width), floating point",
        )
    check_finite({name: held}, path, CheckpointError)
    tokens = held[:COMPARED_CLASSES].reshape(-1, held.shape[2]).float()
    distinct: Tensor = torch.unique(tokens, dim=0)
    return distinct


def deep_prompts(state: dict[str, Tensor], path: Path, first: str, prefix: str) -> Tensor:
    """Remove the prompts of one encoder from the state and return them, (depth, tokens, width)."""
    if first not in state:
        raise CheckpointError(f"is not a PromptSRC checkpoint: it has no {first}", path=path)
    layers = {0: state.pop(first)}
    for name in list(state):
        if (match := DEEP_PROMPT.fullmatch(name.removeprefix(prefix))) and name.startswith(prefix):
            layers[int(match[1])] = state.pop(name)
    if sorted(layers) != list(range(len(layers))) or len({value.shape for value in layers.values()}) > 1:
        raise CheckpointError(
            f"the prompts of {prefix.rstrip('.')} are not of one shape, or not those of the first layers",
            path=path,
            found=f"layers {', '.join(map(str, sorted(layers)))}",
        )
    stacked = torch.stack([layers[layer] for layer in sorted(layers)])
    if stacked.ndim != 3 or not bool(stacked.isfinite().all()):
        raise CheckpointError(
            f"{first} has the wrong shape, or NaN or infinite values",
            path=path,
            found=tuple(layers[0].shape),
            allowed="(tokens, width), the same for every class",
        )
    return stacked


def _read_inert(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError("no such file", path=path)
    try:
        if is_torchscript(path):
            raise _Refused("it is a TorchScript program")
        return torch.load(path, map_location="cpu", pickle_module=INERT_PICKLE, weights_only=False)
    except _Refused as error:
        raise CheckpointError(f"is refused: {error}, which reading weights does not need", path=path) from error
    except PermissionError as error:
        raise CheckpointError("could not be read: permission denied", path=path) from error
    except Exception as error:  # torch, zipfile and pickle raise many kinds for a damaged file
        raise CheckpointError(
            f"could not be read as a checkpoint: {error or type(error).__name__}", path=path
        ) from error
