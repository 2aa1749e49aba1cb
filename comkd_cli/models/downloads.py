"""A block without network access: what a student.pt of unknown origin names is read from caches or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

# Audit events, which the interpreter raises before each of these calls, whichever library makes it.
NETWORK_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}


class DownloadRefused(ConnectionError):
    """A connection was attempted inside `forbidden`."""


class _Firewall:
    """Refuses connections of the whole process, since libraries also download in threads of their own."""

    def __init__(self) -> None:
        self.closed = 0
        self._hooked = False

    def close(self) -> None:
        """Refuse connections until `open` is called the same number of times."""
        if not self._hooked:  # an audit hook cannot be removed, so it is added once and only if it is needed
            sys.addaudithook(self._audit)
            self._hooked = True
        self.closed += 1

    def open(self) -> None:
        """Undo one `close`."""
        self.closed -= 1

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.closed or event not in NETWORK_EVENTS:
            return
        # Unix sockets, whose address is a path, connect processes of this machine.
        if event in ("socket.connect", "socket.sendto") and not isinstance(arguments[1], tuple):
            return
        raise DownloadRefused("downloads are forbidden here")


_FIREWALL = _Firewall()


@contextmanager
def forbidden(unless: bool = False) -> Iterator[None]:
    """Inside the block every connection to a host is refused, and only caches are read.

    unless: True makes the block do nothing. The Hub's client is set to its offline mode, so that it reads its cache
    at once instead of retrying a connection.
    """
    if unless:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    _FIREWALL.close()
    try:
        yield
    finally:
        _FIREWALL.open()
        constants.HF_HUB_OFFLINE = before


def are_forbidden() -> bool:
    """Whether a `forbidden` block is active."""
    return _FIREWALL.closed > 0


def was_refused(error: BaseException) -> bool:
    """Whether an error inside `forbidden`, or one of its causes, is a refused download."""
    cause: BaseException | None = error
    while are_forbidden() and cause is not None:
        if isinstance(cause, DownloadRefused | OfflineModeIsEnabled | LocalEntryNotFoundError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
