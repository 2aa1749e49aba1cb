"""Ctrl-C and the scheduler's SIGTERM, taken as a wish to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

WISHES = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_wishes() -> Iterator[Callable[[], int | None]]:
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
