"""What a frozen teacher says of each crop, kept on disk: asked once, read by every student that sees the crop."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.errors import CheckpointError
from comkd_cli.files import write_text

CACHE_FORMAT = "comkd-teacher-cache/1"
DTYPES: dict[str, type[np.generic]] = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True)
class CacheKey:
    """All that decides what is kept; each key has a folder of its own."""

    identity: str
    """A digest of the teacher's weights and pre-processing, the names and contents of the images, how they are cropped
    and the seed of that."""
    images: int
    dim: int
    """Of a feature."""
    views: int
    dtype: str
    """`fp16` or `fp32`."""

    @property
    def size_bytes(self) -> int:
        """On disk, once every view is there."""
        return self.views * self.images * (self.dim * np.dtype(DTYPES[self.dtype]).itemsize + 1)


class TeacherCache:
    """The teacher's image features of (image, view), in two files that are mapped into memory.

    A feature is written before it is marked as there, so what a killed run leaves is whole. Runs may share a
    cache at the same time: what they write to a place is the same. rows: the place of each image, int64
    (images,); None: its index. made_of: named plain data that the key's identity is a digest of, kept in cache.json
    for people. Raises CheckpointError for a folder that holds another cache.
    """

    def __init__(
        self, folder: Path, key: CacheKey, rows: np.ndarray | None = None, made_of: Mapping[str, Any] | None = None
    ) -> None:
        self.key = key
        self._made_of = dict(made_of or {})
        self._rows = rows
        self.folder = folder / key.identity[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: can't be made: {error.strerror or error}") from error
        self._check_or_write_meta()
        shape = (key.views, key.images)
        # The features come first and the marks last: a folder with marks has features.
        marks = self.folder / "there.bin"
        is_new = not marks.exists() or not marks.stat().st_size
        self._allocate("features.bin", DTYPES[key.dtype], (*shape, key.dim), is_new)
        self._allocate("there.bin", np.uint8, shape, is_new)
        self.reopen()

    def reopen(self) -> None:
        """Map the files anew: a folder on the network shows what other machines wrote when a file is opened."""
        shape = (self.key.views, self.key.images)
        self._maps = [self._map("features.bin"), self._map("there.bin")]
        self._features = np.frombuffer(self._maps[0], DTYPES[self.key.dtype]).reshape(*shape, self.key.dim)
        self._there = np.frombuffer(self._maps[1], np.uint8).reshape(shape)

    def missing(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Which of these images have no feature of this view yet, bool (len(indices),)."""
        return np.asarray(self._there[view, self.places(indices)] == 0)

    def marks(self, view: int) -> np.ndarray:
        """Which places of a view have a feature, a bit each, as it is now; for `marked`."""
        return np.packbits(self._there[view])

    def marked(self, marks: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Which of these images had a feature when the marks were taken, bool (len(indices),)."""
        places = self.places(indices)
        return np.asarray((marks[places >> 3] >> (7 - (places & 7)) & 1).astype(bool))

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Where the features of images stand within a view."""
        return indices if self._rows is None else np.asarray(self._rows[indices])

    def read(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Features of images that are there, float32 (len(indices), dim)."""
        return np.asarray(self._features[view, self.places(indices)], dtype=np.float32)

    def write(self, view: int, indices: np.ndarray, features: np.ndarray) -> None:
        """Keep features, (len(indices), dim); what an earlier run wrote to the place counts no more."""
        self.put(view, indices, features)
        self.mark(view, indices)

    def put(self, view: int, indices: np.ndarray, features: np.ndarray) -> None:
        """The first half of `write`: features that nobody takes for there yet."""
        self._features[view, self.places(indices)] = features

    def mark(self, view: int, indices: np.ndarray) -> None:
        """The second half of `write`."""
        self._there[view, self.places(indices)] = 1

    def seconds_per_crop(self) -> float | None:
        """What the teacher took for a crop, on average over all that filled the cache; None where nobody told."""
        try:
            cost = json.loads(self._cost_file.read_text(encoding="utf-8"))
            return float(cost["seconds"]) / int(cost["crops"])
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):  # an estimate is not worth an error
            return None

    def add_cost(self, seconds: float, crops: int) -> None:
        """Tell what the teacher took for crops that were written."""
        before = self.seconds_per_crop()
        known = 0 if before is None else max(self.count() - crops, 0)
        total = {"seconds": seconds + known * (before or 0), "crops": crops + known}
        write_text(self._cost_file, json.dumps(total) + "\n")

    @property
    def _cost_file(self) -> Path:
        return self.folder / "cost.json"

    def count(self) -> int:
        """Crops whose features are there."""
        return int(np.count_nonzero(self._there))

    def flush(self) -> None:
        """Bring to disk what the system still holds in memory."""
        for mapping in self._maps:
            mapping.flush()

    def release(self) -> None:
        """Take what was read and written out of this process's memory; the system keeps it as long as it likes."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self._maps:
                mapping.madvise(mmap.MADV_DONTNEED)

    def _check_or_write_meta(self) -> None:
        path = self.folder / "cache.json"
        meta = {"format": CACHE_FORMAT, **self.key.__dict__}
        if not path.is_file():
            write_text(path, json.dumps({**meta, "made_of": self._made_of}, indent=2) + "\n")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can't be read: {error}; remove {self.folder} to fill it anew") from error
        if not isinstance(found, dict) or {name: found.get(name) for name in meta} != meta:
            raise CheckpointError(
                f"{path}: is another cache than its folder says; remove {self.folder} to fill it anew"
            )

    def _allocate(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], is_new: bool) -> None:
        path = self.folder / name
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if (found := os.fstat(descriptor).st_size) not in ((0, size) if is_new else (size,)):
                    raise CheckpointError(f"{path}: has {found} bytes and not {size}; remove {self.folder}")
                if found != size:
                    _take_from_disk(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{path}: can't be made {size / 1e6:,.1f} MB large: {error.strerror or error}; make room, or lower "
                "teacher_cache.views"
            ) from error

    def _map(self, name: str) -> mmap.mmap:
        path = self.folder / name
        try:
            with path.open("r+b") as file:
                return mmap.mmap(file.fileno(), 0)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be opened: {error.strerror or error}") from error


def _take_from_disk(descriptor: int, size: int) -> None:
    """Make a new file so large at once: a full disk would kill the process later, where the map is written."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            # Some folders on the network can't be asked for room.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)
