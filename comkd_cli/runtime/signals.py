"""Ctrl-C and the scheduler's SIGTERM: a stop at the next safe point, or at once with everything cleaned up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

WISHES = (signal.SIGINT, signal.SIGTERM)
STOPS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
TOGETHER_SECONDS = 2.0
"""`timeout` and some schedulers send one signal to the process and the same to its group: these are one request."""


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end; no `except Exception` of a library takes it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        """As shells report it."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Within the block, a call gives the exit code of a stop that was asked for, or None.

    The code is 128 + the signal's number, as shells report it. A second signal of the same kind acts at
    once, as it does outside the block. Outside the main thread, where signals can't be caught, nobody
    can ask.
    """
    wished: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def remember(number: int, _frame: FrameType | None) -> None:
        wished.append(128 + number)
        signal.signal(number, before[signal.Signals(number)])

    # What was ignored on entry, as a shell does for its background jobs, stays ignored.
    before = {
        number: handler for number in WISHES if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, remember)
    try:
        yield lambda: wished[0] if wished else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping_at_once() -> Iterator[Callable[[], None]]:
    """Within the block, SIGINT, SIGTERM and SIGHUP raise Stopped, so that temporary files are removed.

    Without it, SIGTERM and SIGHUP end Python where it is. The same holds for a signal that comes once more after
    TOGETHER_SECONDS. A call raises Stopped where a signal has come already: an exception in a function that C code
    calls back can be lost. Outside the main thread, where signals can't be caught, nothing changes.
    """
    came: list[tuple[int, float]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not came:
            came.append((number, now))
            raise Stopped(number)
        if now - came[0][1] > TOGETHER_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            os.kill(os.getpid(), number)

    def check() -> None:
        if came:
            raise Stopped(came[0][0])

    before = {
        number: handler for number in STOPS if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, stop)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
