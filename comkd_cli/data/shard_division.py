"""Divides the index of shards into that of the images to train on and that of the held-out ones.

Each part is an index of its own on disk, so that no memory grows with the images, and whatever reads an index reads a
part as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from comkd_cli.data.holdout import Holdout, name_and_size_digest
from comkd_cli.data.shard_index import INDEX_FORMAT, ShardIndex, blocks, map_array
from comkd_cli.data.shard_indexing import hashes_of, key_bytes, ordered_digest_of, rank_images
from comkd_cli.data.shard_members import SkippedFiles
from comkd_cli.files import atomic_folder, remove_folder, write_text

PARTS = {"train": False, "held_out": True}
ARRAYS = ("offsets", "sizes", "key_ends", "keys", "hashes", "contents")

Mask = Callable[[slice], np.ndarray]
"""From adjacent images to whether each is held out, bool (images,)."""


def divide_index(index: ShardIndex, holdout: Holdout) -> tuple[ShardIndex, ShardIndex] | None:
    """The index of the images to train on and that of the held-out ones, made now unless they are beside the index.

    None if either would be empty.
    """
    held_out = _mask(index, holdout)
    count = sum(int(held_out(block).sum()) for block in blocks(len(index)))
    if not 0 < count < len(index):
        return None
    home = index.folder.with_name(f"{index.folder.name}.holdout-{holdout.percent!r}")
    train, held = (_opened(index, home / name, held_out, is_held) for name, is_held in PARTS.items())
    return train, held


def _mask(index: ShardIndex, holdout: Holdout) -> Mask:
    """Which images are held out: by their contents, or if no image was read by their keys and sizes."""

    def by_contents(block: slice) -> np.ndarray:
        return holdout.held_out(index.contents[block])

    def by_name_and_size(block: slice) -> np.ndarray:
        positions = range(block.start, block.stop)
        # The name of a shard in a key depends on which other shards there are.
        digests = (name_and_size_digest(index.key(i), index.size_bytes(i)) for i in positions)
        return np.fromiter(map(holdout.holds_out, digests), dtype=bool, count=len(positions))

    return by_name_and_size if holdout.fingerprint == "size_and_time" else by_contents


def _opened(index: ShardIndex, folder: Path, held_out: Mask, is_held: bool) -> ShardIndex:
    """The part of the images whose mask is `is_held`."""
    if (folder / "index.json").is_file():
        try:
            return ShardIndex(folder)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: made again
            remove_folder(folder)
    try:
        with atomic_folder(folder) as unfinished:
            _write(index, unfinished, lambda block: held_out(block) == is_held)
    except OSError:  # another process may have written the same part in the meantime
        if not (folder / "index.json").is_file():
            raise
    return ShardIndex(folder)


def _write(index: ShardIndex, folder: Path, chosen: Mask) -> None:
    """Write the index of the chosen images, in their order."""
    key_end, counts = 0, np.zeros(len(index.shards), dtype=np.int64)
    files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
    try:
        for block in blocks(len(index)):
            mask = chosen(block)
            whole = index.arrays(block)
            lengths = whole["key_lengths"][mask]
            ends = key_end + np.cumsum(lengths)
            key_end = int(ends[-1]) if len(ends) else key_end
            positions = block.start + np.flatnonzero(mask)
            part = {
                "offsets": whole["offsets"][mask],
                "sizes": whole["sizes"][mask],
                "key_ends": ends,
                "keys": whole["keys"][np.repeat(mask, whole["key_lengths"])],
                "hashes": hashes_of([key_bytes(index.key(position)) for position in positions.tolist()]),
                "contents": index.contents[block][mask],
            }
            for name, file in files.items():
                file.write(np.ascontiguousarray(part[name]).tobytes())
            shards = np.searchsorted(index.starts, positions, side="right") - 1
            counts += np.bincount(shards, minlength=len(counts))
    finally:
        for file in files.values():
            file.close()
    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    map_array(folder / "rows.bin", np.int64, starts[-1], new=True).flush()
    about = {
        "format": INDEX_FORMAT,
        "shards": [str(path) for path in index.shards],
        "starts": starts,
        "prefixed": index.prefixed,
        "digest": "",
        "ordered_digest": "",
        "passed_by": asdict(SkippedFiles()),
    }
    write_text(folder / "index.json", json.dumps(about))
    written = ShardIndex(folder)
    digest = rank_images(written, folder)
    assert isinstance(digest, str)  # since no key of the whole index is repeated
    ordered = ordered_digest_of(written, digest)
    write_text(folder / "index.json", json.dumps({**about, "digest": digest, "ordered_digest": ordered}))
    (folder / "hashes.bin").unlink()
