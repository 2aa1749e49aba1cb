"""Starts a command, kills it as planned, and finds the processes that it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.kills.kinds import Kind
from benchmarks.kills.points import Watch
from tests import warm

ORPHAN_SECONDS = 30.0  # a loader's worker looks for its parent every 5 s
HANG_SECONDS = 300.0


@dataclass(frozen=True)
class Kill:
    """When a run is to be killed."""

    mode: str
    """`instant`, `before` or `during` a file operation."""
    fraction: float
    """Of the duration of an undisturbed run, or of its file operations."""
    delay: float
    """Seconds after the operation began, for `during`."""


@dataclass(frozen=True)
class Usual:
    """An undisturbed run."""

    seconds: float
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """A run that ended, by itself or not."""

    code: int
    """-9 of one that was killed."""
    seconds: float
    operations: tuple[str, ...]
    said: str

    @property
    def killed(self) -> bool:
        """Whether the kill came before its end."""
        return self.code == -signal.SIGKILL


@dataclass(frozen=True)
class Before:
    """What a new process does before the command."""

    kind: Kind
    watch: Watch

    def __call__(self) -> None:
        """Do it."""
        tempfile.tempdir = None  # so that TMPDIR counts
        self.watch()
        if self.kind.before is not None:
            self.kind.before()


class Runner:
    """Runs commands in a folder."""

    def __init__(self, root: Path, hub: str) -> None:
        """hub: the address of the Hub to fetch from."""
        self._root = root
        self._sessions: list[int] = []
        temporary = str(root / "temporary")
        self._variables = {
            "TMPDIR": temporary,
            "HF_ENDPOINT": hub,
            "HF_HOME": str(root / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, kind: Kind, kill: Kill | None = None, usual: Usual | None = None) -> Ended:
        """Run a kind's command until it ends or is killed. usual: needed with `kill`."""
        log = self._root / "operations.log"
        log.unlink(missing_ok=True)
        watch = Watch(self._root, log)
        instant = None
        if kill is not None and usual is not None:
            if kill.mode == "instant":
                instant = kill.fraction * usual.seconds
            else:
                delay = kill.delay if kill.mode == "during" else None
                watch = replace(watch, kill_at=int(kill.fraction * len(usual.operations)), delay=delay)
        setup = {**kind.setup, "exported": self._root / "exported"} if kind.exported else kind.setup
        started = time.monotonic()
        process = warm.Process(
            *kind.arguments, cwd=self._root, env=self._variables, digits=None, before=Before(kind, watch), **setup
        )
        self._sessions.append(process.pid)
        timer = threading.Timer(instant or 0, process.kill)
        if instant is not None:
            timer.start()
        try:
            with process:
                out, err = process.communicate(HANG_SECONDS)
        finally:
            timer.cancel()
        operations = log.read_text(errors="replace").splitlines() if log.exists() else []
        return Ended(process.returncode or 0, time.monotonic() - started, tuple(operations), out + err)

    def orphans(self) -> list[str]:
        """The command lines of the processes of the runs so far that do not end by themselves, and end now."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := _of_sessions(self._sessions)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in left:
            os.kill(process, signal.SIGKILL)
        self._sessions.clear()
        return list(left.values())


def _of_sessions(sessions: list[int]) -> dict[int, str]:
    """The command lines of the processes of these sessions, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # pid (name) state ppid pgrp session ...; a name may hold spaces and brackets
            state, *_, session = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = line.strip()
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return found


def revision() -> str:
    """The commit of this checkout, with a plus where it has changes."""
    here = Path(__file__).parent
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() or "unknown"
