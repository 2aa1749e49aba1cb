"""Files of plain data and tensors: written atomically, loaded with weights_only=True, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from comkd_cli.errors import CheckpointError, ComkdError
from comkd_cli.files import atomic_write, is_newer_format
from comkd_cli.models.weights import check_finite


def mapping_or_none(value: Any, name: str) -> dict[str, Any] | None:
    """The value, a mapping or None. Raises TypeError."""
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"{name} should be a mapping, not {value!r}")
    return value


def checked_texts(value: Any) -> tuple[str, ...]:
    """The value, a list of texts. Raises TypeError."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"should be a list of texts, not {value!r}")
    return tuple(value)


def reason_of(error: Exception) -> str:
    """What is wrong with a checkpoint, from an error that was raised while it was read."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    return str(error) if isinstance(error, ValueError) else repr(error)


def check_plain(data: Mapping[str, Any], texts: Sequence[str], texts_or_none: Sequence[str]) -> None:
    """Raise ValueError if a field that every checkpoint has does not have the type that comkd writes."""
    for name in texts:
        if not isinstance(data[name], str):
            raise ValueError(f"{name} should be text, not {data[name]!r}")
    for name in texts_or_none:
        if not isinstance(data.get(name), str | None):
            raise ValueError(f"{name} should be text or None, not {data[name]!r}")
    names, metrics = data["class_names"], data["metrics"]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names should be a list of texts")
    if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise ValueError("metrics should be numbers by name")


def check_tensors(path: Path, data: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Raise CheckpointError for tensors with NaN, or whose shapes or types differ from those that comkd writes."""
    vectors, scale = data["class_vectors"], data["logit_scale"]
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(class_names):
        found = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        problem = f"is damaged: its class vectors should be ({len(class_names)} classes, width)"
        raise CheckpointError(problem, path=path, field="class_vectors", found=found)
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise CheckpointError("is damaged: its logit scale should be one number", path=path, field="logit_scale")
    if not (vectors.is_floating_point() and scale.is_floating_point()):
        raise CheckpointError("is damaged: its class vectors and its logit scale should be real numbers", path=path)
    if others := [name for name, value in data["state_dict"].items() if not isinstance(value, Tensor)]:
        raise CheckpointError("is damaged: its state_dict should contain only tensors", path=path, found=others[0])
    check_finite({**data["state_dict"], "class_vectors": vectors, "logit_scale": scale}, path, CheckpointError)


def save_plain(path: Path, data: dict[str, Any]) -> None:
    """Write plain data and tensors atomically, to be read with weights_only=True. Raises ComkdError.

    Equal data gives equal bytes. Given a path, torch would store the name of the temporary file.
    """
    plain = _without_identities(data, {})
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        stream = _Stream(file)
        try:
            torch.save(plain, stream)  # type: ignore[arg-type]  # it calls only `write` and `flush`
        except RuntimeError as error:  # torch's writer hides the error of the system
            if stream.error is not None:
                raise stream.error from error
            problem = f"could not be written ({str(error).splitlines()[0]})"
            raise ComkdError(problem, path=path, remedy="is the disk full?") from error


class _Stream:
    """A file that torch writes, which remembers why it could not be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _without_identities(value: Any, texts: dict[str, str]) -> Any:
    """The value with each text as one object, and each list, tuple and mapping as one of its own.

    Pickle writes an object once, and refers to it where it comes again, so its bytes depend on which equal texts are
    the same object. In this respect, a resumed run differs from an undisturbed one.
    """
    if type(value) is str:
        return texts.setdefault(value, value)
    if type(value) is dict:
        return {_without_identities(key, texts): _without_identities(item, texts) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_identities(item, texts) for item in value)
    return value


def load_plain(path: Path, expected: str, kind: str) -> dict[str, Any]:
    """The content of a checkpoint of the format `expected`; kind names it in errors. Raises CheckpointError."""
    if path.is_dir():
        raise CheckpointError("is a folder", path=path, remedy="specify the student.pt in it")
    if not path.is_file():
        raise CheckpointError("no such file", path=path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError("could not be read: permission denied", path=path) from error
    except Exception as error:  # torch, zipfile and pickle raise many kinds
        raise CheckpointError(
            f"could not be loaded as {kind} saved by comkd: the file is damaged, or was not written by comkd", path=path
        ) from error
    found = data.get("format", "no format") if isinstance(data, dict) else type(data).__name__
    if isinstance(data, dict) and is_newer_format(data.get("format"), expected):
        raise CheckpointError(
            "has the format of a newer comkd",
            path=path,
            found=found,
            allowed=[expected],
            remedy="upgrade comkd (pip install --upgrade comkd)",
        )
    if not isinstance(data, dict) or found != expected:
        raise CheckpointError(f"is not {kind} that comkd saved", path=path, found=found, allowed=[expected])
    return data
