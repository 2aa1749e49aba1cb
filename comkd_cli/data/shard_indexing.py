"""Makes the index of tar shards (data/shard_index.py): a part for each shard, then the whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from itertools import groupby, pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from zipfile import BadZipFile

import numpy as np

from comkd_cli.data.contents import Fingerprint
from comkd_cli.data.image_files import SUFFIXES
from comkd_cli.data.shard_index import INDEX_FORMAT, ShardIndex, blocks, content_digest, map_array, state_digest
from comkd_cli.data.shard_members import ImageMember, SkippedFiles, read_members
from comkd_cli.errors import DataError, WriteError
from comkd_cli.events import Progress, Report
from comkd_cli.files import atomic_folder, atomic_write, remove_folder, sha256_of_data, write_text
from comkd_cli.runtime import ranks

DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a damaged index raises when it is opened."""
SHARDS_PER_PROCESS = 16  # an indexing process takes seconds to start, and a shard of 10,000 images a second


def open_index(shards: Sequence[Path], home: Path, report: Report, fingerprint: Fingerprint = "contents") -> ShardIndex:
    """The index of shards, made now unless `home` has it already.

    Its folder is named by a digest of the shards' names, sizes and times of change, so that other shards never
    use it. Indexing resumes after it was killed. fingerprint: `contents` reads every image, so that a replaced image is
    noticed; `size_and_time` reads only headers. Raises DataError, naming the shard.
    """
    # Links are not followed: a key may have its shard's name before it, and a link's target has any name.
    paths = [path.absolute() for path in shards]
    states = [[str(path), (state := path.stat()).st_size, state.st_mtime_ns, state.st_ctime_ns] for path in paths]
    name = sha256_of_data([INDEX_FORMAT, fingerprint, sorted(SUFFIXES), states])[:16]
    make = partial(_open_or_make, paths, home / name, report, fingerprint)
    try:
        return make()
    except (OSError, WriteError):
        # Another process may have finished the same index meanwhile, and removed the parts that this one used. If
        # that was not the cause, the second attempt fails as well.
        return make()


def _open_or_make(paths: Sequence[Path], folder: Path, report: Report, fingerprint: Fingerprint) -> ShardIndex:
    if (folder / "index.json").is_file():
        try:
            return ShardIndex(folder)
        except (FileNotFoundError, *DAMAGE):  # made again
            remove_folder(folder)
    parts = folder.with_name(f"{folder.name}.parts")
    _make_parts(paths, parts, report, fingerprint)
    with atomic_folder(folder) as unfinished:
        _join_parts(paths, parts, unfinished, fingerprint)
    shutil.rmtree(parts, ignore_errors=True)  # as another process may be doing
    return ShardIndex(folder)


def _make_parts(shards: Sequence[Path], parts: Path, report: Report, fingerprint: Fingerprint) -> None:
    """Index every shard that has no part yet, in several processes if there are many."""
    absent = [(path, _part(parts, number)) for number, path in enumerate(shards)]
    absent = [(path, part) for path, part in absent if not part.is_file()]
    workers = min(ranks.usable_cores(), len(absent) // SHARDS_PER_PROCESS)

    def show(done: int) -> None:
        report(Progress("indexing shards", done, len(absent), unit="shards"))

    if workers < 2:
        for done, (path, part) in enumerate(absent):
            show(done)
            _index_shard(path, part, fingerprint)
        return
    # Spawned, because a fork would inherit the locks that torch's threads hold.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_work)
    try:
        for done, _ in enumerate(pool.map(partial(_index_shard, fingerprint=fingerprint), *zip(*absent, strict=True))):
            show(done + 1)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that indexed shards was killed", path=parts, remedy="rerun the same command to resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_work() -> None:
    """Ignore Ctrl-C, which reaches the whole process group, and exit when the parent exits or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # of a pool's worker

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    Thread(target=exit_with_parent, daemon=True).start()


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.npz"


def _index_shard(path: Path, part: Path, fingerprint: Fingerprint) -> None:
    """Write the positions, keys and digests of the images of one shard. Raises DataError."""
    skipped = SkippedFiles()
    found = list(read_members(path, skipped))
    if not found:
        names = ", ".join(f"KEY{suffix}" for suffix in sorted(SUFFIXES))
        raise DataError(
            "; ".join(["contains no images", *skipped.texts()]),
            path=path,
            remedy=f"comkd reads members named {names}",
        )
    keys = [key_bytes(key) for key, _, _ in found]
    hashes = hashes_of(keys)
    if twins := _sort_equal_hashes(np.argsort(hashes, kind="stable"), hashes, lambda position: found[position][0]):
        raise DataError(
            "contains a sample twice", path=path, found=found[twins[0]][0], remedy="give each sample its own key"
        )
    with atomic_write(part) as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            offsets=np.array([offset for _, offset, _ in found], dtype=np.int64),
            sizes=np.array([size for _, _, size in found], dtype=np.int64),
            keys=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_lengths=np.array([len(key) for key in keys], dtype=np.int64),
            hashes=hashes,
            contents=np.frombuffer(b"".join(_content_digests(path, found, fingerprint)), dtype=np.uint8),
            passed_by=np.frombuffer(json.dumps(asdict(skipped)).encode(), dtype=np.uint8),
        )


def _content_digests(path: Path, found: Sequence[ImageMember], fingerprint: Fingerprint) -> Iterator[bytes]:
    """A digest of each image's bytes, or of its shard's size and modification time. Raises DataError."""
    try:
        with path.open("rb") as file:
            if fingerprint == "size_and_time":
                shard = state_digest(os.fstat(file.fileno()))
                yield from (shard for _ in found)
                return
            for _, offset, size in found:
                file.seek(offset)
                yield content_digest(file.read(size))
    except OSError as error:
        raise DataError(f"could not be read: {error.strerror or error}", path=path) from error


def key_bytes(key: str) -> bytes:
    """A key as it is hashed and written."""
    return key.encode("utf-8", "surrogateescape")  # as tarfile reads names that are not UTF-8


def hashes_of(keys: Sequence[bytes]) -> np.ndarray:
    """64 bits of each key, uint64 (keys,)."""
    joined = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    return np.frombuffer(joined, dtype="<u8")


def _join_parts(shards: Sequence[Path], parts: Path, folder: Path, fingerprint: Fingerprint) -> None:
    """Write the whole index from its parts. Raises DataError if keys repeat."""
    starts, key_end, skipped = [0], 0, SkippedFiles()
    names = ("offsets", "sizes", "key_ends", "keys", "hashes", "contents")
    files = {name: (folder / f"{name}.bin").open("wb") for name in names}
    try:
        for number, path in enumerate(shards):
            part = _loaded(path, _part(parts, number), fingerprint)
            part["key_ends"] = key_end + np.cumsum(part.pop("key_lengths"))
            key_end = int(part["key_ends"][-1])
            starts.append(starts[-1] + len(part["key_ends"]))
            skipped.add(SkippedFiles(**json.loads(part["passed_by"].tobytes())))
            for name, file in files.items():
                file.write(part[name].tobytes())
    finally:
        for file in files.values():
            file.close()
    map_array(folder / "rows.bin", np.int64, starts[-1], new=True).flush()
    about = {
        "format": INDEX_FORMAT,
        "shards": [str(path) for path in shards],
        "starts": starts,
        "prefixed": False,
        "digest": "",
        "ordered_digest": "",
        "passed_by": asdict(skipped),
    }
    for prefixed in (False, True):
        about["prefixed"] = prefixed
        write_text(folder / "index.json", json.dumps(about))
        index = ShardIndex(folder)
        if prefixed:
            _hash_prefixed(index, folder)
        ranked = rank_images(index, folder)
        if isinstance(ranked, str):
            ordered = ordered_digest_of(index, ranked)
            write_text(folder / "index.json", json.dumps({**about, "digest": ranked, "ordered_digest": ordered}))
            (folder / "hashes.bin").unlink()
            return
        first, second = ranked
    raise DataError(
        f"{index.shard_of(first)} and {index.shard_of(second)} have the same name and both contain the sample",
        field="data.shards",
        found=index.key(first),
        remedy="rename one of the two shards",
    )


def _loaded(path: Path, part: Path, fingerprint: Fingerprint) -> dict[str, np.ndarray]:
    """The part of a shard; made again if another process has removed the parts meanwhile."""
    try:
        with np.load(part, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile):
        _index_shard(path, part, fingerprint)
    with np.load(part, allow_pickle=False) as arrays:
        return dict(arrays)


def _hash_prefixed(index: ShardIndex, folder: Path) -> None:
    """Write the hashes again, of keys prefixed by their shards' names."""
    hashes = map_array(folder / "hashes.bin", "<u8", len(index), writable=True)
    for block in blocks(len(index)):
        hashes[block] = hashes_of([key_bytes(index.key(i)) for i in range(block.start, block.stop)])
    hashes.flush()


def rank_images(index: ShardIndex, folder: Path) -> str | tuple[int, int]:
    """Write each image's rank among all, by the hash of its key; returns a digest of keys and contents in that order.

    If two images have the same key, returns their positions instead. Hashes are sorted range by range, so that
    memory is bounded; keys with equal hashes are ranked by their text.
    """
    count = len(index)
    hashes = map_array(folder / "hashes.bin", "<u8", count)
    rows = map_array(folder / "rows.bin", np.int64, count, writable=True)
    bits = max(1, sum(1 for _ in blocks(count)).bit_length())
    digest, first = hashlib.sha256(), 0
    for number in range(2**bits):
        where = np.concatenate(
            [block.start + np.flatnonzero(hashes[block] >> np.uint64(64 - bits) == number) for block in blocks(count)]
        )
        found = hashes[where]
        order = np.argsort(found, kind="stable")
        if twins := _sort_equal_hashes(order, found, partial(_key_at, index, where)):
            return int(where[twins[0]]), int(where[twins[1]])
        ranks = np.empty(len(where), dtype=np.int64)
        ranks[order] = np.arange(first, first + len(where))
        rows[where] = ranks  # in the order of the file, not of the ranks
        first += len(where)
        contents = index.contents[where][order]
        digest.update(np.column_stack([found[order].view(np.uint8).reshape(-1, 8), contents]).tobytes())
    rows.flush()
    return digest.hexdigest()


def ordered_digest_of(index: ShardIndex, digest: str) -> str:
    """A digest of the images in the order of the shards."""
    ordered = hashlib.sha256(digest.encode())
    for block in blocks(len(index)):
        ordered.update(index.rows[block].astype("<i8").tobytes())
    return ordered.hexdigest()


def _key_at(index: ShardIndex, where: np.ndarray, position: int) -> str:
    return index.key(int(where[position]))


def _sort_equal_hashes(order: np.ndarray, hashes: np.ndarray, key: Callable[[int], str]) -> tuple[int, int] | None:
    """Sort positions with equal hashes by their keys, in place; returns two positions with equal keys, if any."""
    ranked = hashes[order]
    twins = np.flatnonzero(ranked[1:] == ranked[:-1])
    for _, run in groupby(enumerate(twins.tolist()), lambda pair: pair[1] - pair[0]):
        starts = [start for _, start in run]
        equal = slice(starts[0], starts[-1] + 2)
        named = sorted((key(position), position) for position in order[equal].tolist())
        for (name, position), (following, other) in pairwise(named):
            if name == following:
                return position, other
        order[equal] = [position for _, position in named]
    return None
