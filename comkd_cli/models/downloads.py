"""Whether files may be fetched: what a file of somebody else's names comes from this machine or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

# Raised by the interpreter itself before each of these calls, whichever library makes it.
NETWORK_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}


class DownloadRefused(ConnectionError):
    """Something was about to use the network where that is forbidden."""


class _Gate:
    """Stands before the network for the whole process: libraries also fetch in threads of their own."""

    def __init__(self) -> None:
        self.closed = 0
        self._hooked = False

    def close(self) -> None:
        """Refuse connections until `open` is called as often."""
        if not self._hooked:  # an audit hook stays for good, so it is added once and only where it is needed
            sys.addaudithook(self._audit)
            self._hooked = True
        self.closed += 1

    def open(self) -> None:
        """Take back one `close`."""
        self.closed -= 1

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.closed or event not in NETWORK_EVENTS:
            return
        # Sockets of the file system, whose address is a path, join processes of this machine.
        if event in ("socket.connect", "socket.sendto") and not isinstance(arguments[1], tuple):
            return
        raise DownloadRefused("downloads are forbidden here")


_GATE = _Gate()


@contextmanager
def forbidden(unless: bool = False) -> Iterator[None]:
    """Inside, nothing is fetched: caches answer, and every connection to a host is refused.

    unless: True leaves everything as it is. The Hub's client is told as well, so that it looks into its
    cache at once instead of trying again and again.
    """
    if unless:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    _GATE.close()
    try:
        yield
    finally:
        _GATE.open()
        constants.HF_HUB_OFFLINE = before


def are_forbidden() -> bool:
    """Whether this is inside `forbidden`."""
    return _GATE.closed > 0


def was_refused(error: BaseException) -> bool:
    """Whether an error inside `forbidden`, or one that it came from, is that something was not fetched."""
    met: BaseException | None = error
    while are_forbidden() and met is not None:
        if isinstance(met, DownloadRefused | OfflineModeIsEnabled | LocalEntryNotFoundError):
            return True
        met = met.__cause__ or met.__context__
    return False
