"""The files of a checkpoint: the last two, each whole, and with a digest that is checked when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comkd_cli.errors import CheckpointError, ComkdError
from comkd_cli.files import is_newer_format, remove_folder
from comkd_cli.models.plain_data import save_plain
from comkd_cli.runtime import ranks
from comkd_cli.runtime.locks import has_lock_files

STATE_FORMAT = "comkd-state/4"
DIGEST = "sha256"
"""The field of a checkpoint that holds the digest of all others."""
NEWEST, BEFORE, NEXT = "state.pt", "previous.pt", "next.pt"


def checkpoint_file(folder: Path) -> Path:
    """The newest checkpoint of the task whose files are in this folder."""
    return folder / "state" / NEWEST


def delete_checkpoint(folder: Path) -> None:
    """Delete the checkpoints of a task's folder; with several processes, the main one does."""
    if ranks.is_main():
        remove_folder(checkpoint_file(folder).parent)


def has_leftovers(folder: Path) -> bool:
    """Whether a checkpoint or a lock is beside a finished task: its process is about to delete it, or was killed."""
    return checkpoint_file(folder).parent.exists() or has_lock_files(folder)


def restart_remedy(folder: Path) -> str:
    """What to do to train without the checkpoints of a folder."""
    return f"to start from scratch, delete {checkpoint_file(folder).parent}, or use --fresh for a student"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, and keep the one before.

    A process that is killed in between leaves the new one as NEXT, so that no instant has fewer than one whole file.
    """
    newest = checkpoint_file(folder)
    following = newest.with_name(NEXT)
    try:
        save_plain(following, {**state, DIGEST: digest_of(state)})
    except ComkdError as error:
        error.path = newest  # the name that a user knows
        raise
    if newest.exists():
        newest.replace(newest.with_name(BEFORE))
    following.replace(newest)


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a folder."""

    path: Path
    state: dict[str, Any]
    damaged: Mapping[Path, str]
    """Newer ones that could not be read, with the reason."""

    def delete_damaged(self) -> None:
        """Delete the newer ones, which would otherwise become the checkpoint before the next one."""
        if ranks.is_main():
            for path in self.damaged:
                path.unlink(missing_ok=True)


def read_state(folder: Path) -> Found | None:
    """The newest whole checkpoint, or None if there is none.

    Raises CheckpointError if the newest whole one has another format, and if all are damaged.
    """
    damaged: dict[Path, str] = {}
    for name in (NEXT, NEWEST, BEFORE):
        path = checkpoint_file(folder).with_name(name)
        if not path.is_file():
            continue
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            _check_format(state["format"], path, folder)
            _check_digest(state)
        except CheckpointError:
            raise
        except Exception as error:  # torch and pickle raise many kinds for a damaged file
            damaged[path] = str(error)
            continue
        return Found(path, state, damaged)
    for path, reason in damaged.items():
        raise CheckpointError(
            f"cannot resume from this checkpoint ({reason})", path=path, remedy=restart_remedy(folder)
        )
    return None


def _check_format(found: str, path: Path, folder: Path) -> None:
    if found == STATE_FORMAT:
        return
    newer = is_newer_format(found, STATE_FORMAT)
    raise CheckpointError(
        f"was written by {'a newer' if newer else 'another'} version of comkd",
        path=path,
        found=found,
        allowed=[STATE_FORMAT],
        remedy=f"upgrade comkd, or {restart_remedy(folder)}" if newer else restart_remedy(folder),
    )


def _check_digest(state: dict[str, Any]) -> None:
    """Raise ValueError if the content is not what was written; older versions wrote no digest."""
    expected = state.pop(DIGEST, None)
    if expected is not None and digest_of(state) != expected:
        raise ValueError("its content does not match its sha256")


def digest_of(value: Any) -> str:
    """The sha256 of plain data with tensors, in hexadecimal: of names, types, shapes and bytes, in their order."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous()
            digest.update(f"{content.dtype}{tuple(content.shape)}".encode())
            digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, Mapping):
            digest.update(f"{{{len(part)}".encode())
            for name, item in part.items():
                digest.update(repr(name).encode())
                add(item)
        elif isinstance(part, list | tuple):
            digest.update(f"[{len(part)}".encode())
            for item in part:
                add(item)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()
