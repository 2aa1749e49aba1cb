"""A frozen teacher's image features of each crop, on disk: computed once, read by every student that sees the crop."""

from __future__ import annotations

import json
import math
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.errors import CheckpointError
from comkd_cli.files import allocate, remove_unfinished, write_text
from comkd_cli.runtime.locks import has_lock_files, if_free, in_turn_with_others

SYNC_SECONDS = 5.0
SYNC_CROPS = 4096
"""Features wait for the disk together: what a kill can cost."""
ROWS_AT_ONCE = 4096
UNIT_TOLERANCE = 1e-2
"""Of the length of a feature, far above the rounding of fp16."""
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
    """The teacher's image features of (image, view), of unit length, in two files that are mapped into memory.

    A mark says that a feature is cached. It is written once the feature is on the disk, so that neither a kill nor a
    loss of power leaves a mark without its feature. A feature that is not finite or not of unit length all the same, as
    on a damaged disk, counts as missing. Runs may share a cache at the same time: they write the same feature to the
    same row. rows: the row of each image, int64
    (images,); None: its index. made_of: named plain data that the key's identity is a digest of, written to cache.json
    for people to read. Raises CheckpointError for a directory that holds another cache.
    """

    def __init__(
        self, folder: Path, key: CacheKey, rows: np.ndarray | None = None, made_of: Mapping[str, Any] | None = None
    ) -> None:
        self.key = key
        self._made_of = dict(made_of or {})
        self._rows = rows
        self._unmarked: list[tuple[int, np.ndarray]] = []  # views and rows of features that may not be on the disk yet
        self._unmarked_since = 0.0
        self.damaged = 0
        """Marked features that were not finite or not of unit length, and so were found missing."""
        self._maps: list[mmap.mmap] = []
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
        self._write_marks()
        shape = (self.key.views, self.key.images)
        self._maps = [self._map("features.bin"), self._map("there.bin")]
        self._features = np.frombuffer(self._maps[0], DTYPES[self.key.dtype]).reshape(*shape, self.key.dim)
        self._marks = np.frombuffer(self._maps[1], np.uint8).reshape(shape)

    def missing(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Which of these images have no feature of this view yet, or a damaged one, bool (len(indices),)."""
        rows = self.rows(indices)
        marked = self._marks[view, rows] != 0
        marked[marked] = self._sound(view, rows[marked])
        for of_view, new in self._unmarked:
            if of_view == view:
                marked |= np.isin(rows, new)
        return np.asarray(~marked)

    def _sound(self, view: int, rows: np.ndarray) -> np.ndarray:
        """Which of these marked rows have a unit feature, bool (len(rows),); the marks of the others are removed."""
        sound = np.empty(len(rows), bool)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            features = self._features[view, rows[part]].astype(np.float32)
            sound[part] = np.abs(np.linalg.norm(features, axis=1) - 1) < UNIT_TOLERANCE  # false for NaN
        self._marks[view, rows[~sound]] = 0
        self.damaged += int(np.count_nonzero(~sound))
        return sound

    def marks(self, view: int) -> np.ndarray:
        """A snapshot of which rows of a view have a feature, one bit each; for `marked`."""
        return np.packbits(self._marks[view])

    def marked(self, view: int, marks: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Which of these images had a feature when the snapshot of the view was taken, bool (len(indices),)."""
        rows = self.rows(indices)
        found = (marks[rows >> 3] >> (7 - (rows & 7)) & 1).astype(bool)
        found[found] = self._sound(view, rows[found])
        return np.asarray(found)

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
        """Mark features as cached, after `put`: in this object at once, in the file when they are on the disk.

        That is at the latest at the first call after SYNC_SECONDS or SYNC_CROPS crops, or with `flush`.
        """
        now = time.monotonic()
        if not self._unmarked:
            self._unmarked_since = now
        self._unmarked.append((view, self.rows(indices)))
        crops = sum(len(rows) for _, rows in self._unmarked)
        if crops >= SYNC_CROPS or now - self._unmarked_since >= SYNC_SECONDS:
            self._write_marks()

    def _write_marks(self) -> None:
        """Wait until all features are on the disk, then write their marks."""
        if self._unmarked:
            self._maps[0].flush()
            for view, rows in self._unmarked:
                self._marks[view, rows] = 1
            self._unmarked.clear()

    def seconds_per_crop(self) -> float | None:
        """The teacher's time for a crop, averaged over all crops in the cache; None if it was not recorded."""
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
        self._write_marks()
        return int(np.count_nonzero(self._marks))

    def flush(self) -> None:
        """Write to disk what the system still holds in memory."""
        self._write_marks()
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
                "was written for other settings or data, or by another version of comkd",
                path=path,
                remedy=f"delete {self.folder} to rebuild the cache",
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
