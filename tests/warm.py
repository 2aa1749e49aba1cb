"""Commands as processes that are forked from one that has imported everything: each starts in a moment.

Signals, exit codes, pipes and ranks are those of `python -m comkd_cli`, which imports for seconds first. Tests of the
interpreter itself (what `--help` imports, the encoding of standard output, torchrun) start a new one.
"""

import gc
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]
PRELOADED = ["tests.preloaded"]


@cache
def context() -> ForkServerContext:
    """Of multiprocessing: its processes are forked from one that has imported everything, and ends with this one."""
    from multiprocessing import forkserver

    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return found


class _Stream:
    """A file descriptor that is passed to the new process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __getstate__(self) -> Any:
        return DupFd(self.descriptor)

    def __setstate__(self, passed: Any) -> None:
        self.descriptor = passed.detach()


def _encoding(variables: Mapping[str, str]) -> str:
    return variables.get("PYTHONIOENCODING", "utf-8")


@dataclass(frozen=True)
class Setup:
    """What a new process does before it runs its module."""

    module: str = "comkd_cli"
    digits: int | None = tiny.DIGITS
    """Of the dataset `digits`, the first images alone: `tiny.few_digits`. None: all."""
    exported: Path | None = None
    """Keep in this folder what torch exported, and take it from there; see `export_once`."""
    figures: bool = False
    """Draw the figures of reports, which takes longer than to score a small student."""
    most_bytes: int | None = None
    """Of a file that it writes; a larger one meets EFBIG."""
    package: Path | None = None
    """The folder of another comkd_cli."""
    fresh: Sequence[str] = ()
    """Packages to import again."""
    hub: bool = False
    """Read HF_ENDPOINT, HF_HOME and the other variables of huggingface_hub again, which it reads when imported."""
    before: Callable[[], None] | None = None
    """Called last."""

    def apply(self) -> None:
        """Do it."""
        if self.package is not None:
            sys.path.insert(0, str(self.package))
        for name in [name for name in sys.modules if name.partition(".")[0] in self.fresh]:
            del sys.modules[name]
        if self.hub:
            importlib.reload(importlib.import_module("huggingface_hub.constants"))  # others look them up in it
        if self.most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most_bytes, self.most_bytes))
        patch = pytest.MonkeyPatch()
        if self.digits is not None:
            tiny.few_digits(patch, self.digits)
        if self.exported is not None:
            from tests.exported import export_once

            export_once(patch, self.exported)
        if not self.figures:
            patch.setattr("matplotlib.figure.Figure.savefig", save_nothing)
        if self.before is not None:
            self.before()


def save_nothing(_: object, stream: IO[bytes], **__: object) -> None:
    """In place of matplotlib's Figure.savefig: an empty figure."""
    stream.write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')


def _become(
    setup: Setup, arguments: Sequence[str], cwd: Path, variables: Mapping[str, str], streams: Sequence[_Stream]
) -> None:
    """In the new process: run a module as `python -m` does."""
    for descriptor, stream in enumerate(streams):
        os.dup2(stream.descriptor, descriptor)
        os.close(stream.descriptor)
    sys.stdout = os.fdopen(1, "w", encoding=_encoding(variables), buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    multiprocessing.set_start_method(None, force=True)  # for the workers of loaders; it is the one of this process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [setup.module, *arguments]
    setup.apply()
    code: int | str | None = 0
    try:
        runpy.run_module(setup.module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
    # The frames that an error holds on to have loaders, whose workers end with them.
    gc.collect()
    sys.exit(code)


def _read(stream: IO[str]) -> str:
    with stream:
        return stream.read()


class Process:
    """A forked process, with what tests use of subprocess.Popen."""

    def __init__(
        self,
        *arguments: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        terminal: int | None = None,
        **setup: Any,
    ) -> None:
        """Start `comkd ARGUMENTS`, with these variables beside those of this process.

        terminal: a descriptor for its three streams, which are otherwise the null device and two pipes. setup: the
        fields of Setup.
        """
        self.args = [str(argument) for argument in arguments]
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        variables = {**os.environ, **(env or {})}
        if terminal is None:
            (out, to_out), (err, to_err) = os.pipe(), os.pipe()
            own = [os.open(os.devnull, os.O_RDONLY), to_out, to_err]
            self.stdout = os.fdopen(out, encoding=_encoding(variables))
            self.stderr = os.fdopen(err, encoding="utf-8", errors="replace")
        else:
            own = [os.dup(terminal) for _ in range(3)]
        streams = [_Stream(descriptor) for descriptor in own]
        settings = (Setup(**setup), self.args, cwd, variables, streams)
        self._process = context().Process(target=_become, args=settings)
        self._process.start()
        self._lock = threading.Lock()
        self.pid = self._process.pid or 0
        for descriptor in own:
            os.close(descriptor)

    @property
    def returncode(self) -> int | None:
        """As subprocess has it: negative if a signal ended it, None while it runs."""
        with self._lock:  # the exit code is read from a pipe, once
            return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60) -> int | None:
        """The exit code, once it has ended, or None after the timeout."""
        deadline = time.monotonic() + timeout
        while self.returncode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What it writes to both streams until it ends; it is killed after the timeout."""
        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        with ThreadPoolExecutor(2) as readers:
            texts = [readers.submit(_read, stream) for stream in streams]
            expired = self.wait(timeout) is None
            self.kill()
        self.wait()
        if expired:
            raise subprocess.TimeoutExpired(self.args, timeout, texts[0].result(), texts[1].result())
        return texts[0].result(), texts[1].result()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def run(
    *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 240, **setup: Any
) -> subprocess.CompletedProcess[str]:
    """Run `comkd ARGUMENTS` to its end; see Process."""
    with Process(*arguments, cwd=cwd, env=env, **setup) as process:
        out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)
