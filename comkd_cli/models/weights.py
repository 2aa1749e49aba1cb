"""Files of weights: what is in them, whether it can be used, and why a model does not take it."""

from __future__ import annotations

import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comkd_cli.errors import ComkdError, ModelError

MOST_NAMED = 3
SHARE_THAT_FITS = 0.5  # of a model's tensors: a file that holds so many of them holds that model, under other names
# Names by which programs keep weights that a model does not take under them.
TRANSFORMERS_PREFIXES = ("vision_model.", "text_model.")
OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
PROMPTSRC_PREFIXES = ("prompt_learner.", "image_encoder.VPT")
GIT_LFS = b"version https://git-lfs"
READ_BY_OPEN_CLIP_ALONE = (".npz", ".npy")


def read_weights(path: Path) -> dict[str, Any]:
    """What a file of weights holds, as it stands in the file; tensors are mapped from the disk where that works.

    Nothing of the file is executed. Raises ModelError, naming the file and the remedy.
    """
    if (what := _no_weights(path)) is not None:
        raise ModelError(f"{path}: {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if is_torchscript(path):
            raise ModelError(
                f"{path}: is a TorchScript archive, as OpenAI publishes its CLIPs. That is a program, which comkd does "
                "not run; give open_clip's tag instead, such as arch: ViT-B-32-quickgelu with weights: openai"
            )
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError as error:
        raise ModelError(f"{path}: can't be read: permission denied") from error
    except ModelError:
        raise
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
        raise ModelError(f"{path}: does not hold weights that can be loaded: {first_line(error)}") from error
    if not isinstance(held, Mapping):
        raise ModelError(
            f"{path}: does not hold weights: it holds {type(held).__name__}, not tensors by name; save the model's "
            "state_dict() instead"
        )
    if not held:
        raise ModelError(f"{path}: does not hold weights: it holds no tensors; save the model's state_dict() instead")
    return dict(held)


def _no_weights(path: Path) -> str | None:
    """What a file is that stands in the place of weights, and the remedy; None where it may hold some."""
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS))
    except OSError:  # explained where the file is read
        return None
    if not start:
        return "is empty; copy or download it again"
    if start == GIT_LFS:
        return "is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`"
    return None


def first_line(error: Exception) -> str:
    """What went wrong, in one line; torch's own message would go on to advise loading a file unsafely."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Weights only load failed"):
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            return "it holds more than plain tensors; save the state_dict alone with the program that wrote it"
        return "it is no checkpoint of plain tensors"
    return lines[0] if lines else type(error).__name__


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of a TorchScript program."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # by which torch.load, too, takes a file for an archive
            return False
    # Asked of torch's own reader, which sees archives that Python's does not.
    records: list[str] = torch._C.PyTorchFileReader(str(path)).get_all_records()
    return "constants.pkl" in records


def state_of(held: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, where open_clip's reader looks for them: below `state_dict`, without `module.`."""
    inner = held.get("state_dict", held)
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if next(iter(tensors), "").startswith("module."):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def check_finite(tensors: Mapping[str, object], where: object, error: type[ComkdError] = ModelError) -> None:
    """Refuse tensors with values that are no numbers: every score of such a model would be chance.

    where: the file or the weights, for the message. Raises `error`, naming the first such tensor.
    """
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise error(
                f"{where}: holds NaN or infinite values, first in {name}; the file is damaged, or comes from a "
                "training that diverged: use another"
            )


def differences(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    """The first tensors that a file lacks, has too many, or has in other shapes, in one line."""
    missing = [name for name in expected if name not in found]
    strange = [name for name in found if name not in expected]
    reshaped = [
        f"{name} of the shape {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return _differences(missing, strange, reshaped)


def differences_told(error: Exception) -> str | None:
    """The same, of what torch's load_state_dict says; None for another error."""
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
    reshaped = [f"{name} of the shape ({found}) instead of ({wanted})" for name, found, wanted in shapes]
    return _differences(listed.get("Missing", []), listed.get("Unexpected", []), reshaped) or None


def _differences(missing: list[str], strange: list[str], reshaped: list[str]) -> str:
    kinds = (("lacks", missing, ""), ("has", strange, ", which the model does not have"), ("has", reshaped, ""))
    parts = []
    for verb, items, remark in kinds:
        if items:
            more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
            parts.append(f"{verb} {', '.join(items[:MOST_NAMED])}{more}{remark}")
    return "; ".join(parts)


def remedy(path: Path, held: Mapping[str, Any], expected: Collection[str]) -> str | None:
    """What to do with a file whose tensors are a model's under other names, or another model's; None: nothing known.

    expected: the names of the model's tensors.
    """
    names = [str(name) for name in state_of(held)]
    kind = str(held.get("format", ""))
    if kind.startswith("comkd-student"):
        return "it is a student that comkd distilled; give the weights of a CLIP"
    if any(name.startswith(PROMPTSRC_PREFIXES) for name in names):
        return "it is a checkpoint of PromptSRC or PromptKD; read it with teacher.format: promptsrc"
    if set(names) >= OPENAI_NUMBERS:
        return (
            "it is a state_dict as OpenAI's own code has it; use weights: openai with an architecture whose name ends "
            f"in -quickgelu, or remove {', '.join(sorted(OPENAI_NUMBERS))} from it"
        )
    if any(name.startswith(TRANSFORMERS_PREFIXES) for name in names):
        return (
            "its tensors have the names of the transformers library; use the same model as open_clip has it: a tag of "
            "the architecture, or arch: hf-hub:ORG/NAME of a repository with an open_clip_config.json"
        )
    key, prefix, count = _best_place(held, set(expected))
    if count < SHARE_THAT_FITS * len(expected):
        inside = sum(f"visual.{name}" in expected for name in names)
        return "it holds an image tower alone, and both towers are needed" if names and inside == len(names) else None
    return None if (key in (None, "state_dict") and not prefix) else _unwrapping(path, key, prefix)


def _best_place(held: Mapping[str, Any], expected: set[str]) -> tuple[str | None, str, int]:
    """Below which key, after which prefix, most of the expected names stand, and how many they are."""
    places: list[tuple[str | None, Mapping[Any, Any]]] = [(None, held)]
    places += [(key, value) for key, value in held.items() if isinstance(value, Mapping)]
    best: tuple[str | None, str, int] = (None, "", 0)
    for key, tensors in places:
        prefixes: Counter[str] = Counter()
        for name in map(str, tensors):
            parts = name.split(".")
            for cut in range(len(parts)):
                if ".".join(parts[cut:]) in expected:
                    prefixes["".join(f"{part}." for part in parts[:cut])] += 1
        for prefix, count in prefixes.items():
            if count > best[2]:
                best = (key, prefix, count)
    return best


def _unwrapping(path: Path, key: str | None, prefix: str) -> str:
    """The command that writes a file's tensors as they should stand."""
    below = f"below `{key}`" if key is not None else ""
    after = f"after `{prefix}`" if prefix else ""
    tensors = f"torch.load({str(path)!r}, weights_only=True)" + (f"[{key!r}]" if key is not None else "")
    if path.suffix == ".safetensors":
        tensors = f"safetensors.torch.load_file({str(path)!r})"
    kept = f"{{k.removeprefix({prefix!r}): v for k, v in {tensors}.items() if k.startswith({prefix!r})}}"
    imports = "import torch, safetensors.torch" if path.suffix == ".safetensors" else "import torch"
    target = str(path.with_name(f"{path.stem}-plain.pt"))
    program = f"{imports}; torch.save({kept if prefix else tensors}, {target!r})"
    return (
        f"its tensors stand {' '.join(filter(None, (below, after)))}; write them alone and give that file: "
        f"python -c {shlex.quote(program)}"
    )
