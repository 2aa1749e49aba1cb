"""An index of tar shards, by which their images are read in random order.

Shards hold more images than most file systems handle well as files. No memory grows with them: the index is a few files
that are mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from comkd_cli.data.named_bytes import NamedBytes
from comkd_cli.data.shard_members import SkippedFiles
from comkd_cli.edge.images import UnreadableImage, open_image
from comkd_cli.files import allocate

INDEX_FORMAT = "comkd-shards/2"
OPEN_SHARDS = 64  # files that a process holds open: more than a window of the order has
CONTENT_BYTES = 16  # of the digest of an image: with a thousand million images, no two that differ share one
BLOCK_IMAGES = 2**23  # whose hashes and keys are in memory at once


class ShardIndex:
    """Where each image of a list of shards is, in mapped files; pickled as their folder, so each process maps them.

    Images are numbered shard by shard, in the order of the tar. Raises FileNotFoundError, KeyError, TypeError or
    ValueError for a folder without a complete index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if about["format"] != INDEX_FORMAT:
            raise ValueError(f"{folder}: is not of format {INDEX_FORMAT}")
        self.shards = [Path(name) for name in about["shards"]]
        self.digest: str = about["digest"]
        """Of the keys and contents of all images, however they are spread over shards."""
        self.ordered_digest: str = about["ordered_digest"]
        """As `digest`, and different if the images are in another order."""
        self.skipped = SkippedFiles(**about["passed_by"])
        """Members that are not images of the set."""
        self.prefixed: bool = about["prefixed"]
        """Whether the name of its shard is part of each key."""
        self.starts = np.asarray(about["starts"], dtype=np.int64)
        """Where each shard begins, and where the last ends, (shards + 1,)."""
        if len(self.starts) != len(self.shards) + 1 or self.starts[0] != 0 or (np.diff(self.starts) < 0).any():
            raise ValueError(f"{folder}: its shards and their starts do not go together")
        count = int(self.starts[-1])
        self._offsets = map_array(folder / "offsets.bin", np.int64, count)
        self._sizes = map_array(folder / "sizes.bin", np.int64, count)
        self._key_ends = map_array(folder / "key_ends.bin", np.int64, count)
        self._keys = map_array(folder / "keys.bin", np.uint8, int(self._key_ends[-1]))
        contents = map_array(folder / "contents.bin", np.uint8, count * CONTENT_BYTES)
        self.contents: np.ndarray = contents.reshape(count, CONTENT_BYTES)
        """A digest of each image's bytes, or of its shard's size and time, uint8 (images, 16)."""
        self.rows: np.ndarray = map_array(folder / "rows.bin", np.int64, count)
        """The rank of each image among all, by a hash of its key, (images,): the same in whatever shard it is."""
        self._files = _OpenFiles()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[type[ShardIndex], tuple[Path]]:
        return ShardIndex, (self.folder,)

    def shard_of(self, index: int) -> Path:
        """The file that holds an image."""
        return self.shards[int(np.searchsorted(self.starts, index, side="right")) - 1]

    def key(self, index: int) -> str:
        """The key of a sample: its members' common name in the tar, up to the first dot."""
        start = int(self._key_ends[index - 1]) if index else 0
        key = self._keys[start : int(self._key_ends[index])].tobytes().decode("utf-8", "surrogateescape")
        return f"{self.shard_of(index).stem}/{key}" if self.prefixed else key

    def size_bytes(self, index: int) -> int:
        """Of an image's file."""
        return int(self._sizes[index])

    def content(self, index: int) -> bytes:
        """A digest of an image's bytes, 16 bytes; or of its shard's size and time, as the index was made."""
        digest: bytes = self.contents[index].tobytes()
        return digest

    def arrays(self, block: slice) -> dict[str, np.ndarray]:
        """Of adjacent images: `offsets`, `sizes` and `key_lengths`, int64 (images,); `keys`, uint8 (bytes,)."""
        first = int(self._key_ends[block.start - 1]) if block.start else 0
        ends = np.asarray(self._key_ends[block])
        return {
            "offsets": self._offsets[block],
            "sizes": self._sizes[block],
            "key_lengths": np.diff(ends, prepend=first),
            "keys": self._keys[first : int(ends[-1])],
        }

    def open(self, index: int, most_pixels: int | None = None) -> Image.Image:
        """An image as RGB. most_pixels: see `open_image`. Raises UnreadableImage, naming the shard and the key."""
        return open_image(self.read(index), most_pixels)

    def read(self, index: int) -> NamedBytes:
        """An image's file. Raises UnreadableImage, naming the shard and the key."""
        shard = self.shard_of(index)
        name, size = f"{shard}: {self.key(index)}", self.size_bytes(index)
        try:
            content = self._files.read(shard, int(self._offsets[index]), size)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise UnreadableImage(f"{name}: {reason or error}") from error
        if len(content) < size:
            raise UnreadableImage(f"{name}: the shard ends within its bytes")
        return NamedBytes(name, content)

    def spaced(self, most: int) -> list[int]:
        """The positions of about `most` images, evenly spaced over the ranks, by rank."""
        step = max(1, len(self) // most)
        found = {
            int(self.rows[index]): index
            for block in blocks(len(self))
            for index in (block.start + np.flatnonzero(self.rows[block] % step == 0)).tolist()
        }
        return [found[rank] for rank in sorted(found)]


def content_digest(content: bytes) -> bytes:
    """What an index holds of an image's bytes, 16 bytes."""
    return hashlib.blake2b(content, digest_size=CONTENT_BYTES).digest()


def state_digest(state: os.stat_result) -> bytes:
    """What an index holds of an image whose bytes are not read: of its shard's size and modification time, 16 bytes."""
    return content_digest(repr((state.st_size, state.st_mtime_ns)).encode())


def blocks(count: int) -> Iterator[slice]:
    """Slices of as many images as fit into memory; together they cover all images."""
    for start in range(0, count, BLOCK_IMAGES):
        yield slice(start, min(start + BLOCK_IMAGES, count))


def map_array(path: Path, dtype: Any, count: int, new: bool = False, writable: bool = False) -> np.memmap:
    """A file as an array of `count` numbers. Raises ValueError if it is too short, OSError if a new one has no
    room on the disk.
    """
    if new:
        with path.open("wb") as file:
            allocate(file.fileno(), count * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype=dtype, mode="r+" if new or writable else "r", shape=(count,))


class _OpenFiles:
    """The files that this process read last, kept open."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Up to `size` bytes of a file, from an offset on."""
        if self._process != os.getpid():  # forked: its files share their position with the parent's
            self._close()
            self._process = os.getpid()
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = path.open("rb")
            if len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        file = self._files[path]
        file.seek(offset)
        # A damaged index may state any size, and Python allocates what it is to read.
        return file.read(max(0, min(size, os.fstat(file.fileno()).st_size - offset)))

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __del__(self) -> None:
        self._close()
