"""Files that are either whole or not there, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comkd_cli.errors import ComkdError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends well.

    A block that fails, or a process that dies in it, leaves `path` as it was. Raises ComkdError, naming the
    file, where it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())  # mkstemp keeps files to their owner
        with unfinished.open("r+b") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)
    except OSError as error:  # a full disk has no file name of its own
        raise ComkdError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        unfinished = Path(name) / "new"
        unfinished.mkdir()
        yield unfinished
        if not path.exists():
            unfinished.replace(path)
            return
        old = Path(name) / "old"
        path.replace(old)
        try:
            unfinished.replace(path)
        except OSError:
            old.replace(path)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text file as UTF-8."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def check_writable(folder: Path, remedy: str) -> None:
    """Raise ComkdError, with the remedy, where a folder cannot be written to, or cannot be made. It is not made."""
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ComkdError(f"{folder}: can't be written to: {error.strerror or error}; {remedy}") from error


def is_newer_format(found: object, known: str) -> bool:
    """Whether a file's format, such as `comkd-student/2`, is a later version of the known one."""
    kind, _, version = known.rpartition("/")
    if not isinstance(found, str):
        return False
    found_kind, _, found_version = found.rpartition("/")
    is_number = found_version.isascii() and found_version.isdigit() and len(found_version) < 10
    return found_kind == kind and is_number and int(found_version) > int(version)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    if path.exists():
        shutil.rmtree(path)


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_data(data: Any) -> str:
    """The sha256 of plain data, in hexadecimal; the order of a mapping's keys does not count."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # surrogatepass: file names that are not UTF-8 reach Python as lone surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
