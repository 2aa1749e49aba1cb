"""Ctrl-C and the scheduler's SIGTERM: stop at the next safe point, or at once with everything cleaned up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_REQUESTS = (signal.SIGINT, signal.SIGTERM)
STOPS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
TOGETHER_SECONDS = 2.0
"""`timeout`, launchers and some schedulers send a signal to the process and again to its group: one request."""

Handlers = Mapping[signal.Signals, Any]
"""The handlers before a block, as `signal.getsignal` returns them."""


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end; `except Exception` in a library does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        """As shells report it."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Within the block, a call returns the exit code of a requested stop, or None.

    The code is 128 + the signal's number, as shells report it. A signal of the same kind more than TOGETHER_SECONDS
    after the first acts at once, as it does outside the block. Outside the main thread, where Python handles no
    signals, no stop can be requested.
    """
    received: dict[int, float] = {}

    def remember(number: int, before: Handlers) -> None:
        now = time.monotonic()
        if now - received.setdefault(number, now) > TOGETHER_SECONDS:
            _deliver(number, before)

    with _handling(STOP_REQUESTS, remember):
        yield lambda: 128 + next(iter(received)) if received else None


@contextmanager
def stopping_at_once() -> Iterator[Callable[[], None]]:
    """Within the block, SIGINT, SIGTERM and SIGHUP raise Stopped, so that temporary files are removed.

    Without it, SIGTERM and SIGHUP end Python immediately, and so does any of these signals more than TOGETHER_SECONDS
    after the first. A call raises Stopped if a signal was received: an exception in a function that C code calls back
    can be lost. Outside the main thread, where Python handles no signals, nothing changes.
    """
    received: list[tuple[int, float]] = []

    def stop(number: int, before: Handlers) -> None:
        now = time.monotonic()
        if not received:
            received.append((number, now))
            raise Stopped(number)
        if now - received[0][1] > TOGETHER_SECONDS:
            _deliver(number, before)

    def check() -> None:
        if received:
            raise Stopped(received[0][0])

    with _handling(STOPS, stop):
        yield check


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handle: Callable[[int, Handlers], None]) -> Iterator[None]:
    """Within the block, call `handle` for these signals; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What was ignored before, as a shell does for its background jobs, stays ignored.
    before = {n: current for n in numbers if (current := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def handler(number: int, _frame: FrameType | None) -> None:
        handle(number, before)

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _deliver(number: int, before: Handlers) -> None:
    """Let a signal act as it would outside the block."""
    signal.signal(number, before[signal.Signals(number)])
    os.kill(os.getpid(), number)
