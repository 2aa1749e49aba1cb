"""A frozen teacher's image features of each crop, on disk: computed once, read by every student that sees the crop."""

from __future__ import annotations

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
from comkd_cli.files import allocate, remove_unfinished, write_text
from comkd_cli.runtime.locks import has_lock_files, if_free, in_turn_with_others

CACHE_FORMAT = "comkd-teacher-cache/1"
DTYPES: dict[str, type[np.generic]] = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True)
class CacheKey:
    """All that decides the cached features; each key has a directory of its own."""

    identity: str
    """A digest of the teacher's weights and pre-processing, the names and contents of the images, how they are cropped
    and the seed of the crops."""
    images: int
    dim: int
    """Of a feature."""
    views: int
    dtype: str
    """`fp16` or `fp32`."""

    @property
    def size_bytes(self) -> int:
        """On disk, with every view cached."""
        return self.views * self.images * (self.dim * np.dtype(DTYPES[self.dtype]).itemsize + 1)


class TeacherCache:
    """The teacher's image features of (image, view), in two files that are mapped into memory.

    A feature is written before it is marked as cached, so that a killed run leaves no marked feature half written. Runs
    may share a cache at the same time: they write the same feature to the same row. rows: the row of each image, int64
    (images,); None: its index. made_of: named plain data that the key's identity is a digest of, written to cache.json
    for people to read. Raises CheckpointError for a directory that holds another cache.
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
            raise CheckpointError(f"could not be created ({error.strerror or error})", path=self.folder) from error
        with in_turn_with_others(self.folder / "cache.json"):
            self._create_or_check()
        if has_lock_files(self._cost_file):
            with if_free(self._cost_file):  # a run that computes nothing would not write the costs again
                remove_unfinished(self._cost_file)
        self.reopen()

    def reopen(self) -> None:
        """Map the files again: a network file system shows what other machines wrote when a file is opened."""
        shape = (self.key.views, self.key.images)
        self._maps = [self._map("features.bin"), self._map("there.bin")]
        self._features = np.frombuffer(self._maps[0], DTYPES[self.key.dtype]).reshape(*shape, self.key.dim)
        self._marks = np.frombuffer(self._maps[1], np.uint8).reshape(shape)

    def missing(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Which of these images have no feature of this view yet, bool (len(indices),)."""
        return np.asarray(self._marks[view, self.rows(indices)] == 0)

    def marks(self, view: int) -> np.ndarray:
        """A snapshot of which rows of a view have a feature, one bit each; for `marked`."""
        return np.packbits(self._marks[view])

    def marked(self, marks: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Which of these images had a feature when the snapshot was taken, bool (len(indices),)."""
        rows = self.rows(indices)
        return np.asarray((marks[rows >> 3] >> (7 - (rows & 7)) & 1).astype(bool))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these images within a view, (len(indices),)."""
        return indices if self._rows is None else np.asarray(self._rows[indices])

    def read(self, view: int, indices: np.ndarray) -> np.ndarray:
        """The features of images that are cached, float32 (len(indices), dim)."""
        return np.asarray(self._features[view, self.rows(indices)], dtype=np.float32)

    def put(self, view: int, indices: np.ndarray, features: np.ndarray) -> None:
        """Write features, (len(indices), dim). They count as missing until `mark` is called."""
        self._features[view, self.rows(indices)] = features

    def mark(self, view: int, indices: np.ndarray) -> None:
        """Mark features as cached, after `put`."""
        self._marks[view, self.rows(indices)] = 1

    def seconds_per_crop(self) -> float | None:
        """The teacher's time for a crop, averaged over all crops in the cache; None where it was not recorded."""
        try:
            cost = json.loads(self._cost_file.read_text(encoding="utf-8"))
            return float(cost["seconds"]) / int(cost["crops"])
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):  # an estimate is not worth an error
            return None

    def add_cost(self, seconds: float, crops: int) -> None:
        """Record the teacher's time for crops that were just written."""
        with in_turn_with_others(self._cost_file):
            before = self.seconds_per_crop()
            earlier = 0 if before is None else max(self.count() - crops, 0)
            total = {"seconds": seconds + earlier * (before or 0), "crops": crops + earlier}
            write_text(self._cost_file, json.dumps(total) + "\n")

    @property
    def _cost_file(self) -> Path:
        return self.folder / "cost.json"

    def count(self) -> int:
        """The number of cached crops."""
        return int(np.count_nonzero(self._marks))

    def flush(self) -> None:
        """Write to disk what the system still holds in memory."""
        for mapping in self._maps:
            mapping.flush()

    def release(self) -> None:
        """Drop what was read and written from this process's memory; the system may keep it in its page cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self._maps:
                mapping.madvise(mmap.MADV_DONTNEED)

    def _create_or_check(self) -> None:
        self._check_or_write_meta()
        shape = (self.key.views, self.key.images)
        # The features come first and the marks last: a folder with marks has features.
        marks = self.folder / "there.bin"
        is_new = not marks.exists() or not marks.stat().st_size
        self._allocate("features.bin", DTYPES[self.key.dtype], (*shape, self.key.dim), is_new)
        self._allocate("there.bin", np.uint8, shape, is_new)

    def _check_or_write_meta(self) -> None:
        path = self.folder / "cache.json"
        meta = {"format": CACHE_FORMAT, **self.key.__dict__}
        if not path.is_file():
            write_text(path, json.dumps({**meta, "made_of": self._made_of}, indent=2) + "\n")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"could not be read ({error})", path=path, remedy=f"delete {self.folder} to rebuild the cache"
            ) from error
        if not isinstance(found, dict) or {name: found.get(name) for name in meta} != meta:
            raise CheckpointError(
                "does not match its directory", path=path, remedy=f"delete {self.folder} to rebuild the cache"
            )

    def _allocate(self, name: str, dtype: type[np.generic], shape: tuple[int, ...], is_new: bool) -> None:
        path = self.folder / name
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if (found := os.fstat(descriptor).st_size) not in ((0, size) if is_new else (size,)):
                    raise CheckpointError(
                        "has the wrong size in bytes",
                        path=path,
                        found=found,
                        allowed=[size],
                        remedy=f"delete {self.folder} to rebuild the cache",
                    )
                if found != size:
                    allocate(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{size / 1e6:,.1f} MB could not be allocated ({error.strerror or error})",
                path=path,
                remedy="free some space, or lower teacher_cache.views",
            ) from error

    def _map(self, name: str) -> mmap.mmap:
        path = self.folder / name
        try:
            with path.open("r+b") as file:
                return mmap.mmap(file.fileno(), 0)
        except OSError as error:
            raise CheckpointError(f"could not be opened ({error.strerror or error})", path=path) from error
