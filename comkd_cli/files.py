"""Atomic writes of files and folders, and their digests."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from comkd_cli.errors import WriteError

# What a user can do about a failed write.
REMEDIES = {
    errno.ENOSPC: "free space there and in the folder for temporary files",
    errno.EDQUOT: "free space in your quota, or choose another folder",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another folder",
    errno.EIO: "check the disk, or choose another folder",
    **dict.fromkeys((errno.ENODEV, errno.ENXIO, errno.ESTALE), "connect the drive again, or choose another folder"),
    errno.EROFS: "choose a folder on a file system that is not read-only",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EEXIST: "a part of the path is a file; choose another path",
    errno.EISDIR: "a folder has that name; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}
UNFINISHED = ".tmp"
MOST_SECONDS_OF_A_TURN = 10.0
ERRORS_WITHOUT_FILENAME = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE),
)
"""Errors of a write to an open file; Python does not name the file in them."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` when the block succeeds.

    If the block fails, or the process dies in it, `path` stays as it was; leftovers of killed processes are removed
    first. Raises WriteError, naming the file, if it could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _in_turn(path.parent):
            _remove_unfinished(path)
            lock, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
            _lock(lock, wait=False)
    except OSError as error:
        raise write_error(path, error) from error
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())  # mkstemp keeps files to their owner
        _sync(unfinished)
        unfinished.replace(path)
    except OSError as error:  # of a full disk, without a file name
        raise write_error(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
        os.close(lock)


def remove_unfinished(path: Path) -> None:
    """Remove what processes left behind when they were killed while writing the file or folder `path`.

    Call it if `path` may not be written again; every write does this first.
    """
    if path.parent.is_dir():
        with _in_turn(path.parent):
            _remove_unfinished(path)
            _remove_leftovers(path)


def _remove_unfinished(path: Path) -> None:
    """Remove the files of processes that were killed while they wrote `path`; a running process has its file locked."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.????????{UNFINISHED}"):
        if file.is_file() and not file.is_symlink() and (lock := _locked(file, wait=False)) is not None:
            file.unlink(missing_ok=True)
            os.close(lock)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it replaces `path` when the block succeeds.

    If the block fails or is interrupted, `path` stays as it was and nothing is left beside it; leftovers of killed
    processes are removed first. Raises WriteError, naming `path`, if it could not be written; other errors of the
    block pass.
    """
    target = path.resolve()  # renaming `.` or a link would not replace the folder
    if target.is_mount():
        raise WriteError(
            "could not be written: a mount point cannot be replaced",
            path=path,
            remedy=f"choose a folder in it, such as {path / 'bundle'}",
        )
    with scratch_beside(target, path) as scratch:
        unfinished = scratch / "new"
        try:
            unfinished.mkdir()
            yield unfinished
            for file in unfinished.rglob("*"):
                if file.is_file():
                    _sync(file)
            _move_in(scratch, target)
        except OSError as error:
            if not _is_refusal(error, scratch):
                raise
            raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> WriteError:
    """The error of a path that could not be written, with the remedy."""
    reason = error.strerror or str(error)
    remedy = REMEDIES.get(error.errno or 0, "choose another folder")
    return WriteError(f"could not be written: {reason}", path=path, remedy=remedy)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder in the system's folder for temporary files, removed after the block.

    Those of killed processes are removed first.
    """
    with scratch_beside(Path(tempfile.gettempdir(), "comkd")) as scratch:
        folder = scratch / "new"
        folder.mkdir()
        yield folder


@contextmanager
def scratch_beside(target: Path, shown: Path | None = None) -> Iterator[Path]:
    """A folder beside `target`, locked during the block and removed after it; those of killed processes go first.

    Fill its sub-folder `new`, and nothing else, so that it can be distinguished from a folder of another program.
    shown: the path in the WriteError that is raised if the folder cannot be created.
    """
    shown = shown or target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _in_turn(target.parent):
            _remove_leftovers(target)
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            lock = _locked(scratch, wait=True)
    except OSError as error:
        raise write_error(shown, error) from error
    try:
        yield scratch
    finally:
        _put_back(scratch, target)
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _move_in(scratch: Path, target: Path) -> None:
    """Move scratch/new to the target, and an existing target to scratch/old."""
    if target.exists():
        target.replace(scratch / "old")
    (scratch / "new").replace(target)


def _put_back(scratch: Path, target: Path) -> None:
    """Undo the first half of a move whose second half failed."""
    if (scratch / "old").exists() and not target.exists():
        (scratch / "old").replace(target)


def _remove_leftovers(target: Path) -> None:
    """Remove the scratch folders of processes that were killed while they wrote `target`.

    A running process holds the lock of its folder.
    """
    for folder in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        if not folder.is_dir() or folder.is_symlink() or (lock := _locked(folder, wait=False)) is None:
            continue
        try:
            if {entry.name for entry in folder.iterdir()} <= {"new", "old"}:
                _put_back(folder, target)
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another process removes the same one
            continue
        finally:
            os.close(lock)


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """One process at a time creates and locks something temporary in a folder, or removes leftovers there.

    So nothing is treated as a leftover between its creation and its lock. That takes milliseconds: a process that
    holds this lock for longer uses it for something else, and is not waited for.
    """
    handle = None
    try:
        if sys.platform != "win32":
            handle = os.open(folder, os.O_RDONLY)
            deadline = time.monotonic() + MOST_SECONDS_OF_A_TURN
            while _lock(handle, wait=False) is False and time.monotonic() < deadline:
                time.sleep(0.005)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(path: Path, wait: bool) -> int | None:
    """A handle that holds the lock of a file or folder until it is closed; None if another process has the lock.

    The lock ends with its process, however that ends. Also None if the system or the file system has no such locks:
    then nothing counts as a leftover.
    """
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if _lock(handle, wait):
        return handle
    os.close(handle)
    return None


def _lock(handle: int, wait: bool) -> bool | None:
    """Lock an open file or folder: whether that worked, and None if there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_refusal(error: OSError, scratch: Path) -> bool:
    """Whether a write in the scratch folder failed: errors of other files are not the folder's."""
    if error.filename is None:
        return error.errno in ERRORS_WITHOUT_FILENAME
    if error.errno == errno.EEXIST:  # on some file systems, if another process has written the target in the meantime
        return False
    return error.errno in REMEDIES and Path(os.fsdecode(error.filename)).is_relative_to(scratch)


def _sync(file: Path) -> None:
    """Wait until the content is on the disk; some file systems notice only then that it is full."""
    with file.open("r+b") as written:
        os.fsync(written.fileno())


def allocate(descriptor: int, size: int) -> None:
    """Allocate this many bytes for an open file: on a full disk, a write to a map of it would kill the process.

    Raises OSError.
    """
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            # Some network file systems do not support it.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file as UTF-8."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def check_writable(folder: Path, remedy: str) -> None:
    """Raise WriteError, with the remedy, if a folder cannot be written to or created. It is not created."""
    try:
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        problem = f"could not be written: {error.strerror or error}"
        raise WriteError(problem, path=folder, remedy=remedy) from error


def is_newer_format(found: object, known: str) -> bool:
    """Whether a file's format, such as `comkd-student/2`, is a later version of the known one."""
    kind, _, version = known.rpartition("/")
    if not isinstance(found, str):
        return False
    found_kind, _, found_version = found.rpartition("/")
    is_number = found_version.isascii() and found_version.isdigit() and len(found_version) < 10
    return found_kind == kind and is_number and int(found_version) > int(version)


def remove_folder(path: Path) -> None:
    """Remove a folder and its contents, if it exists; another process may do the same at the same time."""
    while path.exists():
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_data(data: Any) -> str:
    """The sha256 of plain data, in hexadecimal; independent of the order of a mapping's keys."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # surrogatepass: file names that are not UTF-8 reach Python as lone surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
