"""Runs one reader on one input, and says what it did: read, refused, or a finding."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from comkd_cli.edge.folder_csv import CsvProblem
from comkd_cli.edge.images import UnreadableImage
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.errors import ComkdError

REFUSALS = (ComkdError, click.ClickException, UnreadableImage, BundleProblem, CsvProblem)
"""What a reader may raise; the last three are those of predict.py, which cannot import ComkdError."""
SECONDS, STOP_SECONDS = 10.0, 60.0
"""Of one input: of the processor, above which it is a finding; and of the clock, after which the process is killed, as
where code waits or C code hangs."""
MOST_BYTES, STOP_BYTES = 2**30, 4 * 2**30
"""By which memory may grow for one input, and where the system refuses more."""
STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork", "pty.spawn"}
CONNECTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FILE_SYSTEM_OF_PROCESSES = "/proc/self"


class _TooSlow(BaseException):
    """The time of an input is over; not an Exception, so that no reader takes it for an error of its own."""


@dataclass(frozen=True)
class Outcome:
    """What became of an input."""

    kind: str
    """`read`, `refused`, or the kind of finding: `traceback`, `slow`, `memory`, `executed`, `connected`, `wrote`."""
    detail: str = ""
    seconds: float = 0.0
    grown_bytes: int = 0

    @property
    def is_finding(self) -> bool:
        """Whether it should not have happened."""
        return self.kind not in ("read", "refused")


@dataclass
class Guard:
    """Watches the readers of one process. folder: the only place, beside that for temporary files, to write to."""

    folder: Path
    canary: Path
    """A file that the payloads of hostile inputs write; nothing else does."""
    _seen: list[tuple[str, str]] = field(default_factory=list)
    _active: bool = False

    def __post_init__(self) -> None:
        self._roots = (*map(os.path.realpath, (self.folder, tempfile.gettempdir())), os.devnull)
        signal.signal(signal.SIGPROF, _raise_too_slow)
        # Audit events come from the interpreter, whichever library calls it; a hook cannot be removed.
        sys.addaudithook(self._audit)

    def attempt(self, read: Callable[[], object]) -> Outcome:
        """Call a reader, and say what it did."""
        self._seen.clear()
        kind, detail = "read", ""
        start, before = time.monotonic(), _reset_peak()
        try:
            with self._watching(), _limited_memory():
                read()
        except REFUSALS as error:
            kind, detail = "refused", type(error).__name__
        except _TooSlow:
            kind, detail = "slow", traceback.format_exc()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            kind, detail = "traceback", traceback.format_exc()
        seconds, grown = time.monotonic() - start, _peak() - before
        if self.canary.exists():
            self.canary.unlink()
            kind, detail = "executed", "the payload wrote its canary"
        elif self._seen:
            kind, detail = self._seen[0]
        elif grown > MOST_BYTES and kind in ("read", "refused"):
            kind, detail = "memory", f"grew by {grown / 2**20:.0f} MiB ({kind})"
        return Outcome(kind, detail, seconds, grown)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event in STARTS:
            self._seen.append(("executed", f"{event}{arguments!r}"[:500]))
        elif event in CONNECTS and (event != "socket.connect" or isinstance(arguments[1], tuple)):
            self._seen.append(("connected", f"{event}{arguments!r}"[:500]))
        elif (event == "open" and _writes(arguments)) or event in CHANGES:
            path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
            if isinstance(path, str | bytes | os.PathLike) and not self._is_inside(os.fsdecode(path)):
                self._seen.append(("wrote", f"{event}{arguments!r}"[:500]))

    def _is_inside(self, path: str) -> bool:
        where = os.path.realpath(path)
        return any(where == root or where.startswith(f"{root}/") for root in self._roots)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _path, _mode, flags = arguments
    return bool(flags & WRITES)


def _raise_too_slow(_number: int, _frame: object) -> None:
    raise _TooSlow


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let the system refuse memory beyond STOP_BYTES, so that no input takes the machine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path(FILE_SYSTEM_OF_PROCESSES, "statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + STOP_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reset_peak() -> int:
    """Forget the peak of the resident memory; returns what is resident now, in bytes."""
    Path(FILE_SYSTEM_OF_PROCESSES, "clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with Path(FILE_SYSTEM_OF_PROCESSES, "status").open() as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
