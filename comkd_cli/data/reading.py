"""Which image each worker process is reading, for the message if one dies: a decoder in C can crash its process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray
from typing import Any

NO_IMAGE = -1


class Reading:
    """The image that each worker of a loader is reading, in memory that the workers share with its process."""

    def __init__(self, workers: int) -> None:
        self._pids: Any = RawArray("q", max(1, workers))
        self._images: Any = RawArray("q", [NO_IMAGE] * max(1, workers))

    def begin(self, worker: int) -> None:
        """Let `reading` write into this worker's place from now on; for the worker itself."""
        self._pids[worker], self._images[worker] = os.getpid(), NO_IMAGE
        _PLACE.images, _PLACE.worker = self._images, worker

    def image_of(self, message: str) -> int | None:
        """The position of the image that a worker was reading when it died; None if it was reading none.

        message: torch's, such as `DataLoader worker (pid 12) is killed by signal: Segmentation fault.`
        """
        dead = {int(pid) for pids in re.findall(r"\(pid\D*([\d, ]+)\)", message) for pid in pids.split(",")}
        pairs = zip(self._pids, self._images, strict=True)
        return next((image for pid, image in pairs if pid in dead and image != NO_IMAGE), None)


@dataclass
class _Place:
    """Where this process writes what it reads, if it is a worker."""

    images: Any = field(default_factory=lambda: [NO_IMAGE])
    worker: int = 0


_PLACE = _Place()


@contextmanager
def reading(image: int) -> Iterator[None]:
    """A block that reads the image at a position. If the process dies in it, `Reading.image_of` has the position."""
    _PLACE.images[_PLACE.worker] = image
    try:
        yield
    finally:
        _PLACE.images[_PLACE.worker] = NO_IMAGE
