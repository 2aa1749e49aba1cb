"""In the process that is to be killed: it notes its file operations, and may die at one of them."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Audit events of Python (https://docs.python.org/3/library/audit_events.html) and where the path is in their arguments.
EVENTS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0, "sqlite3.connect": 0}


@dataclass(frozen=True)
class Watch:
    """Notes each file operation below a folder as a line, `rename work/student.pt`, before it takes place.

    Operations of compiled code, such as safetensors' writer, are not seen; the renames around them are. The process
    also becomes the leader of a session, by which the processes that it starts can be found once it is dead.
    """

    folder: Path
    log: Path
    kill_at: int | None = None
    """The operation, counted from 0, at which to die; None: never."""
    delay: float | None = None
    """Seconds from then until death, for which the operation continues; None: it does not take place."""

    def __call__(self) -> None:
        """Begin."""
        os.setsid()
        notes = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        own, below, count = os.getpid(), f"{self.folder}/", 0

        def note(name: str, path: str) -> None:
            nonlocal count
            if os.getpid() != own or not path.startswith(below):
                return
            os.write(notes, f"{name} {path.removeprefix(below)}\n".encode("utf-8", "surrogateescape"))
            if count == self.kill_at:
                self._die(own)
            count += 1

        sys.addaudithook(lambda event, arguments: _heard(event, arguments, note))
        sync = os.fsync

        def noted_sync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            note("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            sync(descriptor)

        os.fsync = noted_sync

    def _die(self, own: int) -> None:
        if self.delay is None:
            os.kill(own, signal.SIGKILL)
        else:
            _thread.start_new_thread(_kill_later, (own, self.delay))


def _kill_later(process: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)


def _heard(event: str, arguments: tuple[Any, ...], note: Callable[[str, str], None]) -> None:
    if event == "open":
        path, _, flags = arguments
        if flags & WRITES and not isinstance(path, int):
            note("open", _absolute(path))
    elif event in EVENTS:
        path = arguments[EVENTS[event]]
        if isinstance(path, str | bytes | os.PathLike):
            note(event.rpartition(".")[2], _absolute(path))


def _absolute(path: str | bytes | os.PathLike[str]) -> str:
    """Names that shutil.rmtree gives relative to an open folder come out as relative to the current one."""
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - of each operation, links not followed
