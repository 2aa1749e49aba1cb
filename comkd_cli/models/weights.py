"""Files of weights: reading and checking them, and explaining why a model does not load one."""

from __future__ import annotations

import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comkd_cli.errors import ComkdError, ModelError

MOST_NAMED = 3
MOST_REPEATED_BYTES = 2**24  # of a tensor that repeats what it stores, as torch's `expand` does
SAME_MODEL_SHARE = 0.5  # of a model's tensors: a file with at least this share holds that model, under other names
# By the names of their tensors, files of programs whose weights open_clip does not load.
TRANSFORMERS_PREFIXES = ("vision_model.", "text_model.")
OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
PROMPTSRC_PREFIXES = ("prompt_learner.", "image_encoder.VPT")
PROMPTKD_PREFIX = "VPT_image_trans."
GIT_LFS = b"version https://git-lfs"
READ_BY_OPEN_CLIP_ALONE = (".npz", ".npy")
SAVE_STATE_DICT = "save the model's state_dict() instead"


class _UnreadNumber:
    """Stands for a number of numpy, or its type, in a training checkpoint; nothing of it is read."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def numbers_unread() -> AbstractContextManager[object]:
    """A context in which torch.load accepts files of weights that contain numpy's numbers, as training checkpoints do.

    Their constructors are replaced by one that does nothing.
    """
    names = ["numpy.dtype", *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core"))]
    context: AbstractContextManager[object] = torch.serialization.safe_globals(
        [(_UnreadNumber, name) for name in names]
    )
    return context


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a file of weights, by name; tensors are mapped from the disk if that works.

    Nothing in the file is executed. Raises ModelError.
    """
    _refuse_placeholder(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if is_torchscript(path):
            raise ModelError(
                "is a TorchScript archive, as OpenAI publishes its CLIPs, and comkd does not run the program in it",
                path=path,
                remedy="use open_clip's tag instead, such as arch: ViT-B-32-quickgelu with weights: openai",
            )
        with numbers_unread():
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError as error:
        raise ModelError("could not be read: permission denied", path=path) from error
    except ModelError:
        raise
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
        raise ModelError(f"does not hold weights that can be loaded: {first_line(error)}", path=path) from error
    if not isinstance(held, Mapping):
        problem = f"does not hold weights: it holds {type(held).__name__}, not tensors by name"
        raise ModelError(problem, path=path, remedy=SAVE_STATE_DICT)
    if not held:
        raise ModelError("does not hold weights: it holds no tensors", path=path, remedy=SAVE_STATE_DICT)
    return dict(held)


def _refuse_placeholder(path: Path) -> None:
    """Raise ModelError for an empty file and for a pointer of Git LFS."""
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS))
    except OSError:  # read_weights explains it
        return
    if not start:
        raise ModelError("is empty", path=path, remedy="copy or download it again")
    if start == GIT_LFS:
        raise ModelError("is a pointer of Git LFS, not the weights", path=path, remedy="fetch them with `git lfs pull`")


def first_line(error: Exception) -> str:
    """The first line of an error's message; torch's continues with advice to load the file unsafely."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Weights only load failed"):
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            return "it holds more than plain tensors; save only the state_dict with the program that wrote it"
        return "it is not a checkpoint of plain tensors"
    return lines[0] if lines else type(error).__name__


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of a TorchScript program."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch.load recognises an archive by the same bytes
            return False
    # torch's own reader opens archives that Python's zipfile does not.
    try:
        records: list[str] = torch._C.PyTorchFileReader(str(path)).get_all_records()
    # torch.load opens archives by the same reader, and fails too; UnicodeDecodeError for the name of a record.
    except (RuntimeError, UnicodeDecodeError):
        return False
    return "constants.pkl" in records


def tensors_of(held: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file by name, as open_clip reads them: from `state_dict` if there is one, without `module.`."""
    inner = held.get("state_dict", held)
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if next(iter(tensors), "").startswith("module."):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def check_finite(tensors: Mapping[str, object], path: object, error: type[ComkdError] = ModelError) -> None:
    """Refuse tensors with NaN or infinite values: every score of such a model would be chance.

    Also refuses tensors without values, and those that state far more values than they store, which would take any
    amount of memory. path: the file, or the name of the weights. Raises `error`, which names the first such tensor.
    """
    check_stored(tensors, path, error)
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise error(
                f"holds NaN or infinite values, first in {name}: the file is damaged, or its training diverged",
                path=path,
                remedy="use other weights",
            )


def check_stored(tensors: Mapping[str, object], path: object, error: type[ComkdError] = ModelError) -> None:
    """Refuse tensors without values, and those that state far more values than they store. Computes nothing.

    Raises `error`, which names the first such tensor.
    """
    for name, value in tensors.items():
        if isinstance(value, Tensor) and (problem := _unusable(value)) is not None:
            raise error(f"{name} {problem}", path=path, remedy="use other weights")


def _unusable(value: Tensor) -> str | None:
    """Why the values of a tensor cannot be read; None if they can."""
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        return "is a sparse or quantised tensor, or one without values"
    if value.is_floating_point() and value.itemsize == 1:
        return f"has the type {value.dtype}, which is not supported for weights"
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.itemsize > max(stored, MOST_REPEATED_BYTES):
        return f"states the shape {tuple(value.shape)}, but stores {stored:,} bytes"
    return None


def differences(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    """The first tensors that a file lacks, has in addition, or has in other shapes, in one line; empty if none."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} of the shape {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return _listed(missing, unexpected, reshaped)


def differences_in_error(error: Exception) -> str | None:
    """`differences` from the message of torch's load_state_dict; None for another error."""
    text = str(error)
    if not text.startswith("Error(s) in loading state_dict"):
        return None
    listed = {
        kind: re.findall(r'"([^"]+)"', line)
        for kind in ("Missing", "Unexpected")
        for line in text.splitlines()
        if line.strip().startswith(f"{kind} key")
    }
    shapes = re.findall(
        r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([^]]*)\]\) from checkpoint, "
        r"the shape in current model is torch\.Size\(\[([^]]*)\]\)",
        text,
    )
    reshaped = [f"{name} of the shape ({found}) instead of ({expected})" for name, found, expected in shapes]
    return _listed(listed.get("Missing", []), listed.get("Unexpected", []), reshaped) or None


def _listed(missing: list[str], unexpected: list[str], reshaped: list[str]) -> str:
    kinds = (("lacks", missing, ""), ("has", unexpected, ", which the model does not have"), ("has", reshaped, ""))
    parts = []
    for verb, items, remark in kinds:
        if items:
            more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
            parts.append(f"{verb} {', '.join(items[:MOST_NAMED])}{more}{remark}")
    return "; ".join(parts)


@dataclass(frozen=True)
class Diagnosis:
    """Why a model does not load a file, as the problem and the remedy of an error."""

    problem: str
    remedy: str


def diagnose(path: Path, held: Mapping[str, Any], expected: Collection[str]) -> Diagnosis | None:
    """Recognise a file that holds another kind of model, or a model's tensors under other names; None for any other.

    held: the content of the file. expected: the names of the model's tensors.
    """
    names = [str(name) for name in tensors_of(held)]
    if (other := _other_kind(held, names)) is not None:
        return other
    location = _best_location(held, set(expected))
    if location.count < SAME_MODEL_SHARE * len(expected):
        inside = sum(f"visual.{name}" in expected for name in names)
        if not names or inside < len(names):
            return None
        return Diagnosis(
            "it contains only an image tower, but both towers are needed", "use the weights of a whole CLIP"
        )
    if location.key in (None, "state_dict") and not location.prefix:
        return None
    return _unwrapping(path, location)


def _other_kind(held: Mapping[str, Any], names: Collection[str]) -> Diagnosis | None:
    if str(held.get("format", "")).startswith("comkd-student"):
        return Diagnosis("it is a student that comkd distilled", "use the weights of a CLIP")
    if any(name.startswith(PROMPTKD_PREFIX) for name in names):
        return Diagnosis("it is a student that PromptKD distilled", "read it with `comkd import-student`")
    if any(name.startswith(PROMPTSRC_PREFIXES) for name in names):
        return Diagnosis("it is a checkpoint of PromptSRC or PromptKD", "read it with teacher.format: promptsrc")
    if set(names) >= OPENAI_NUMBERS:
        return Diagnosis(
            "it is a state_dict of OpenAI's own code",
            "use weights: openai with an architecture whose name ends in -quickgelu, or remove "
            f"{', '.join(sorted(OPENAI_NUMBERS))} from it",
        )
    if any(name.startswith(TRANSFORMERS_PREFIXES) for name in names):
        return Diagnosis(
            "it is a checkpoint of the transformers library, but not a complete CLIPModel or SiglipModel, the only "
            "ones that comkd converts",
            "use the same model from open_clip: a tag of the architecture, or arch: hf-hub:ORG/NAME of a repository "
            "with an open_clip_config.json",
        )
    return None


@dataclass(frozen=True)
class _Location:
    """Where in a file a model's tensors are."""

    key: str | None
    """The entry that holds them; None for the file itself."""
    prefix: str
    """What precedes the expected names."""
    count: int


def _best_location(held: Mapping[str, Any], expected: set[str]) -> _Location:
    """The location with the most expected names."""
    entries: list[tuple[str | None, Mapping[Any, Any]]] = [(None, held)]
    entries += [(key, value) for key, value in held.items() if isinstance(value, Mapping)]
    best = _Location(None, "", 0)
    for key, tensors in entries:
        prefixes: Counter[str] = Counter()
        for name in map(str, tensors):
            parts = name.split(".")
            for cut in range(len(parts)):
                if ".".join(parts[cut:]) in expected:
                    prefixes["".join(f"{part}." for part in parts[:cut])] += 1
        for prefix, count in prefixes.items():
            if count > best.count:
                best = _Location(key, prefix, count)
    return best


def _unwrapping(path: Path, location: _Location) -> Diagnosis:
    """A remedy with the command that writes a file's tensors under the expected names."""
    key, prefix = location.key, location.prefix
    below = f"under the key `{key}`" if key is not None else ""
    after = f"with the prefix `{prefix}`" if prefix else ""
    tensors = f"torch.load({str(path)!r}, weights_only=True)" + (f"[{key!r}]" if key is not None else "")
    if path.suffix == ".safetensors":
        tensors = f"safetensors.torch.load_file({str(path)!r})"
    kept = f"{{k.removeprefix({prefix!r}): v for k, v in {tensors}.items() if k.startswith({prefix!r})}}"
    imports = "import torch, safetensors.torch" if path.suffix == ".safetensors" else "import torch"
    target = str(path.with_name(f"{path.stem}-plain.pt"))
    program = f"{imports}; torch.save({kept if prefix else tensors}, {target!r})"
    return Diagnosis(
        f"its tensors are {' '.join(filter(None, (below, after)))}",
        f"convert the file with this command and use the file that it writes: python -c {shlex.quote(program)}",
    )
