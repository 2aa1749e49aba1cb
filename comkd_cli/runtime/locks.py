"""Locks between processes: one at a time writes a run, a teacher, a bundle or a dataset.

The lock of `runs/a` is the hidden file `runs/.a.lock`, locked by the operating system, and `runs/.a.holder` says who
holds it. Both are removed when the lock is released. The lock ends with its process, however that ends, so what a
killed process leaves behind is taken over. Reading needs no lock: every file appears whole.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from comkd_cli.errors import InUseError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.files import write_error, write_text

GRACE_SECONDS = 1.0
"""A holder may be about to end: a second start is refused only after this time."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    pid: int
    host: str
    since: str
    """Local time."""

    @classmethod
    def this_process(cls) -> Holder:
        """The holder that this process would be from now on."""
        return cls(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The holder that a note names; None if there is no complete note, as before it is written."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(int(fields["pid"]), str(fields["host"]), str(fields["since"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since}"


@contextmanager
def sole_writer(target: Path) -> Iterator[None]:
    """Within the block, only this process writes `target`, a file or a folder that need not exist.

    Raises InUseError, naming the holder, if another process is in such a block; WriteError if the lock could not
    be created.
    """
    lock = _Lock(target)
    deadline = time.monotonic() + GRACE_SECONDS
    while not lock.acquired():
        if time.monotonic() > deadline:
            raise InUseError(
                "another process is writing it",
                path=target,
                found=lock.holder or "unknown process",
                remedy="wait for that process to finish, or stop it",
            )
        time.sleep(POLL_SECONDS)
    with lock.held():
        yield


@contextmanager
def in_turn_with_others(target: Path, report: Report = ignore_event) -> Iterator[None]:
    """As `sole_writer`, but waits for the other process, which a notice names.

    What the other process has written may be all that this one needs: look for it within the block.
    """
    lock, named = _Lock(target), None
    while not lock.acquired():
        if (holder := lock.holder) not in (None, named):
            report(Notice(f"{target}: waiting for another process that is writing it ({holder})"))
            named = holder
        time.sleep(POLL_SECONDS)
    with lock.held():
        yield


@contextmanager
def if_free(target: Path) -> Iterator[bool]:
    """As `sole_writer`, but if another process is in such a block, this one yields False at once and has no lock."""
    lock = _Lock(target)
    if not lock.acquired():
        yield False
        return
    with lock.held():
        yield True


def has_lock_files(target: Path) -> bool:
    """Whether another process is in such a block, or was killed in one: the next block removes what that one left."""
    return _Lock(target).has_files


class _Lock:
    """The lock of a file or folder, with the note on its holder."""

    def __init__(self, target: Path) -> None:
        whole = target.resolve()  # `.` and links have another name
        self._target = target
        self._path = whole.with_name(f".{whole.name}.lock")
        self._note = whole.with_name(f".{whole.name}.holder")
        self._lock = FileLock(self._path)
        self._exists = True
        """False on a file system without locks, where no process waits for another."""

    @property
    def holder(self) -> Holder | None:
        """The holder, if the note names one."""
        return Holder.read(self._note)

    @property
    def has_files(self) -> bool:
        """Whether the lock or the note exists; the lock exists while anything else of it does."""
        return self._path.exists() or self._note.exists()

    def acquired(self) -> bool:
        """Whether this process has the lock now. Raises WriteError."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        except NotImplementedError:
            self._exists = False
            return True
        except OSError as error:
            raise write_error(self._target, error) from error
        if self._was_removed():
            self._lock.release()
            return False
        return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block after which the lock is released and its files are removed."""
        try:
            if self._exists:
                write_text(self._note, json.dumps(asdict(Holder.this_process())) + "\n")
            yield
        finally:
            if self._exists:
                self._note.unlink(missing_ok=True)
                with suppress(OSError):  # Windows does not remove open files
                    self._path.unlink(missing_ok=True)
                self._lock.release()

    def _was_removed(self) -> bool:
        """Whether the locked file was removed by its last holder between being opened and being locked here.

        filelock checks it itself since version 4, and stores the descriptor here in all earlier ones.
        """
        descriptor = getattr(getattr(self._lock, "_context", None), "lock_file_fd", None)
        return descriptor is not None and os.fstat(descriptor).st_nlink == 0
