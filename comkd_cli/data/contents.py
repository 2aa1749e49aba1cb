"""Digests of image files, which are remembered so that each file is read once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from comkd_cli.events import Progress, Report
from comkd_cli.runtime import ranks

T = TypeVar("T")
Fingerprint = Literal["contents", "size_and_time"]

DIGEST_BYTES = 32
FILES_AT_ONCE = 4096  # looked up, read and remembered together: what an interruption can lose
FILES_PER_THREAD = 64
FILES_PER_QUERY = 500  # SQLite allows 999 variables in older builds
READ_BYTES = 1 << 20
# A file system may keep times in steps of up to 2 s (FAT). A file that changed more recently than that could change
# again without its time showing it, so its digest is not remembered yet.
SETTLED_AFTER_SECONDS = 2.0
LOCK_TIMEOUT_SECONDS = 30.0
NO_REGULAR_FILE = "is not a regular file"
TABLE = """
    CREATE TABLE IF NOT EXISTS files (
        path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER, digest BLOB
    ) WITHOUT ROWID
"""
State = tuple[int, int, int, int]
"""Size, modification time, change time and inode of a file: while they stay the same, so does its content."""


class Contents(Protocol):
    """What the images of a set contain, by key."""

    def digests(self, keys: Sequence[str]) -> Iterator[bytes]:
        """A digest of each image, in the order of the keys; images with equal digests are equal."""
        ...


@dataclass(frozen=True)
class FileContents:
    """The contents of files below a folder.

    The digest of a file is the sha256 of its bytes, whatever its name. It is
    remembered in `index` by the file's path, size, times and inode; a file whose path and state are remembered is not
    read again. With `size_and_time` no file is read: the digest is one of size and modification time.
    """

    root: Path
    fingerprint: Fingerprint = "contents"
    index: Path | None = None
    """SQLite file of remembered digests; None remembers nothing."""
    report: Report | None = field(default=None, compare=False)
    """Receives the progress of the reading."""

    def __getstate__(self) -> dict[str, object]:
        # Worker processes open images and need no digests; a report may not be picklable.
        return {**self.__dict__, "report": None}

    def digests(self, keys: Sequence[str]) -> Iterator[bytes]:
        """The digest of each file, 32 bytes, in order. A file that cannot be read has a digest of the reason."""
        # Strings throughout: a Path of each of a million files takes longer than its stat.
        root = os.path.abspath(self.root)  # noqa: PTH100
        with ThreadPoolExecutor(max(1, ranks.usable_cores() // ranks.per_machine())) as pool:
            for start in range(0, len(keys), FILES_AT_ONCE):
                paths = [os.path.join(root, key) for key in keys[start : start + FILES_AT_ONCE]]  # noqa: PTH118
                states = [state for part in pool.map(_states, _parts(paths)) for state in part]
                if self.fingerprint == "size_and_time":
                    yield from map(_digest_of_state, states)
                else:
                    yield from self._digests_of_files(paths, states, pool, (start, len(keys)))

    def sizes(self, keys: Sequence[str]) -> list[int]:
        """The size of each file in bytes; -1 of a file that cannot be read."""
        states = (_state(str(self.root / key)) for key in keys)
        return [-1 if isinstance(state, str) else state[0] for state in states]

    def _digests_of_files(
        self, paths: Sequence[str], states: Sequence[State | str], pool: ThreadPoolExecutor, progress: tuple[int, int]
    ) -> list[bytes]:
        """The digest of each file, remembered or computed now. progress: files before these, and in all."""
        remembered = _remembered(self.index, paths)
        changed = [
            (path, state)
            for path, state in zip(paths, states, strict=True)
            if path not in remembered or remembered[path][0] != state
        ]
        found: dict[str, bytes] = {}
        done, total = progress[0] + len(paths) - len(changed), progress[1]
        for part in pool.map(_read_digests, _parts(changed)):
            found |= part
            if self.report is not None:
                self.report(Progress("reading image contents", done + len(found), total))
        settled = time.time_ns() - int(SETTLED_AFTER_SECONDS * 1e9)
        if ranks.is_main():
            entries = [
                (path, state, found[path])
                for path, state in changed
                # A file that changed while it was read may have neither its old nor its new content in the digest.
                if not isinstance(state, str) and max(state[1], state[2]) < settled and _state(path) == state
            ]
            _remember(self.index, entries)
        return [found[path] if path in found else remembered[path][1] for path in paths]


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Slices that each keep a thread busy for a while: handing over single files takes longer than a stat."""
    for start in range(0, len(items), FILES_PER_THREAD):
        yield items[start : start + FILES_PER_THREAD]


def _states(paths: Sequence[str]) -> list[State | str]:
    return [_state(path) for path in paths]


def _state(path: str) -> State | str:
    """The state of a file, by which a change is noticed, or why it could not be read."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError as error:
        return error.strerror or type(error).__name__
    if not stat.S_ISREG(found.st_mode):  # reading a pipe blocks forever, reading a device may never end
        return NO_REGULAR_FILE
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, _signed(found.st_ino)


def digest_of_state(path: str) -> bytes:
    """A digest of a file's size and modification time, as of now."""
    return _digest_of_state(_state(path))


def _digest_of_state(state: State | str) -> bytes:
    # The change time and the inode differ between copies of a file, which are the same image.
    return hashlib.sha256(repr(state if isinstance(state, str) else state[:2]).encode()).digest()


def _read_digests(files: Sequence[tuple[str, State | str]]) -> dict[str, bytes]:
    return {path: _digest_of_file(path, state) for path, state in files}


def _digest_of_file(path: str, state: State | str) -> bytes:
    digest = hashlib.sha256()
    try:
        if isinstance(state, str):
            raise OSError(state)
        with open(path, "rb", buffering=0) as stream:  # noqa: PTH123
            while block := stream.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        return hashlib.sha256(f"unreadable: {error.strerror or error}".encode()).digest()
    return digest.digest()


def _remembered(index: Path | None, paths: Sequence[str]) -> dict[str, tuple[State, bytes]]:
    """State and digest of the remembered files."""
    if index is None or not index.is_file():
        return {}
    found: dict[str, tuple[State, bytes]] = {}
    names = {os.fsencode(path): path for path in paths}
    try:
        with closing(_connected(index)) as connection:
            wanted = list(names)
            for start in range(0, len(wanted), FILES_PER_QUERY):
                part = wanted[start : start + FILES_PER_QUERY]
                rows = connection.execute(
                    "SELECT path, size, mtime_ns, ctime_ns, inode, digest FROM files WHERE path IN "
                    f"({','.join('?' * len(part))})",
                    part,
                )
                for path, size, mtime, ctime, inode, digest in rows:
                    if isinstance(digest, bytes) and len(digest) == DIGEST_BYTES:
                        found[names[path]] = (size, mtime, ctime, inode), digest
    except sqlite3.Error:  # a damaged or locked index costs only time: the files are read
        return {}
    return found


def _remember(index: Path | None, entries: Sequence[tuple[str, State, bytes]]) -> None:
    if index is None or not entries:
        return
    rows = [(os.fsencode(path), *state, digest) for path, state, digest in entries]
    for _ in range(2):
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            with closing(_connected(index)) as connection, connection:
                connection.execute(TABLE)
                connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", rows)
            return
        except sqlite3.OperationalError:  # locked, read-only or a full disk: the files are read again next time
            return
        except sqlite3.DatabaseError:  # damaged: delete it, since it holds nothing that the files do not
            index.unlink(missing_ok=True)
        except OSError:
            return


def _signed(number: int) -> int:
    """A number that SQLite can hold: inodes of some file systems use all 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _connected(index: Path) -> sqlite3.Connection:
    return sqlite3.connect(index, timeout=LOCK_TIMEOUT_SECONDS)
