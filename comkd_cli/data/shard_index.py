"""Where each image of tar shards is: an index that is made once, by which they are read at random.

Shards hold more images than a file system likes to have as files. Nothing here grows with them in memory: the
index is a few files that are mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from itertools import groupby, pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from comkd_cli.data.contents import Fingerprint
from comkd_cli.data.image_files import SUFFIXES, below_junk, skipped_text, suffix_of
from comkd_cli.edge.images import UnreadableImage, open_image
from comkd_cli.errors import DataError
from comkd_cli.events import Progress, Report
from comkd_cli.files import folder_written_whole, remove_folder, sha256_of_data, write_text, written_whole
from comkd_cli.runtime import ranks

INDEX_FORMAT = "comkd-shards/2"
OPEN_SHARDS = 64  # files that a process holds open: more than a window of the order has
SHARDS_PER_PROCESS = 16  # an indexing process takes seconds to start, and a shard of 10,000 images a second
CONTENT_BYTES = 16  # of the digest of an image: enough that no two of a thousand million differ and agree
RANKED_AT_ONCE = 2**23  # keys in memory while they are brought into order
# Names that WebDataset itself skips: of the whole archive, not of a sample.
META = re.compile(r"__[^/]*__($|/)")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class SkippedFiles:
    """Members of shards that are no images of the set, and that a user might take for such."""

    others: dict[str, int] = field(default_factory=dict)
    """Members of samples that have no image, by suffix."""
    dotted: int = 0
    """Pictures whose names have a further dot, such as a.b.jpg: to WebDataset the field `b.jpg` of the sample `a`."""
    example: str = ""
    """The name of the first of those."""
    further: int = 0
    """Images of a sample after its first."""

    def add(self, more: SkippedFiles) -> None:
        """Count what another shard has too."""
        self.others = dict(Counter(self.others) + Counter(more.others))
        self.dotted += more.dotted
        self.example = self.example or more.example
        self.further += more.further

    def texts(self) -> list[str]:
        """A sentence for each kind that there is."""
        found = []
        if self.others:
            found.append(f"in samples without an image, {skipped_text(self.others, 'member')}")
        if self.dotted:
            found.append(
                f"{self.dotted:,} pictures such as {self.example} are skipped: a key ends at the first dot of a "
                "name, so they are fields of a sample; rename them to use them as images"
            )
        if self.further:
            found.append(f"{self.further:,} images are skipped: of several images of a sample the first is taken")
        return found


class ShardIndex:
    """Where each image of a list of shards is: mapped files, opened again in each process that they are sent to.

    Images are numbered shard by shard, in the order of the tar. Raises FileNotFoundError, KeyError, TypeError or
    ValueError for a folder that holds no whole index.
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
        """As `digest`, and different where the images are in another order."""
        self.passed_by = SkippedFiles(**about["passed_by"])
        """What the shards hold beside the images."""
        self._prefixed: bool = about["prefixed"]
        self.starts = np.asarray(about["starts"], dtype=np.int64)
        """Where each shard begins, and where the last ends, (shards + 1,)."""
        count = int(self.starts[-1])
        self._offsets = _mapped(folder / "offsets.bin", np.int64, count)
        self._sizes = _mapped(folder / "sizes.bin", np.int64, count)
        self._key_ends = _mapped(folder / "key_ends.bin", np.int64, count)
        self._keys = _mapped(folder / "keys.bin", np.uint8, int(self._key_ends[-1]))
        self._contents = _mapped(folder / "contents.bin", np.uint8, count * CONTENT_BYTES)
        self.rows: np.ndarray = _mapped(folder / "rows.bin", np.int64, count)
        """The rank of each image among all, by a hash of its key, (images,): the same in whatever shard it is."""
        self._files = _OpenFiles()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[type[ShardIndex], tuple[Path]]:
        return ShardIndex, (self.folder,)

    def shard_of(self, index: int) -> Path:
        """The file that an image is in."""
        return self.shards[int(np.searchsorted(self.starts, index, side="right")) - 1]

    def key(self, index: int) -> str:
        """The key of a sample: its members' common name in the tar, up to the first dot."""
        start = int(self._key_ends[index - 1]) if index else 0
        key = self._keys[start : int(self._key_ends[index])].tobytes().decode("utf-8", "surrogateescape")
        return f"{self.shard_of(index).stem}/{key}" if self._prefixed else key

    def size_bytes(self, index: int) -> int:
        """Of an image's file."""
        return int(self._sizes[index])

    def content(self, index: int) -> bytes:
        """A digest of an image's bytes, 16 bytes; or of its shard's size and time, as the index was made."""
        return self._contents[index * CONTENT_BYTES : (index + 1) * CONTENT_BYTES].tobytes()

    def open(self, index: int) -> Image.Image:
        """An image as RGB. Raises UnreadableImage, naming the shard and the key."""
        shard = self.shard_of(index)
        name, size = f"{shard}: {self.key(index)}", self.size_bytes(index)
        try:
            content = self._files.read(shard, int(self._offsets[index]), size)
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror or error}") from error
        if len(content) < size:
            raise UnreadableImage(f"{name}: the shard ends within it")
        return open_image(_Member(name, content))

    def spaced(self, most: int) -> list[int]:
        """The positions of about `most` images, evenly spaced over the ranks, by rank."""
        step = max(1, len(self) // most)
        found = {
            int(self.rows[index]): index
            for block in _blocks(len(self))
            for index in (block.start + np.flatnonzero(self.rows[block] % step == 0)).tolist()
        }
        return [found[rank] for rank in sorted(found)]


def open_index(shards: Sequence[Path], home: Path, report: Report, fingerprint: Fingerprint = "contents") -> ShardIndex:
    """The index of shards, made now unless it is there below `home` already.

    Its folder is named by a digest of the shards' names, sizes and times of change, so that other shards never
    meet it. What a killed indexing had done is not done again. fingerprint: `contents` reads every image, so that
    one that was replaced is noticed; `size_and_time` reads headers alone. Raises DataError, naming the shard.
    """
    # Links are not followed: a key may have its shard's name before it, and a link's target has any name.
    paths = [path.absolute() for path in shards]
    states = [[str(path), (state := path.stat()).st_size, state.st_mtime_ns, state.st_ctime_ns] for path in paths]
    name = sha256_of_data([INDEX_FORMAT, fingerprint, sorted(SUFFIXES), states])[:16]
    folder = home / name
    if (folder / "index.json").is_file():
        try:
            return ShardIndex(folder)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: made anew
            remove_folder(folder)
    parts = home / f"{name}.parts"
    _make_parts(paths, parts, report, fingerprint)
    try:
        with folder_written_whole(folder) as unfinished:
            _join_parts(paths, parts, unfinished, fingerprint)
    except OSError:  # another process may have put the same in its place meanwhile
        if not (folder / "index.json").is_file():
            raise
    shutil.rmtree(parts, ignore_errors=True)  # as another process may be doing
    try:
        return ShardIndex(folder)
    except FileNotFoundError:  # another one has just put the same in its place
        return ShardIndex(folder)


def _make_parts(shards: Sequence[Path], parts: Path, report: Report, fingerprint: Fingerprint) -> None:
    """Index every shard whose part is not there yet, side by side where there are many."""
    absent = [(path, _part(parts, number)) for number, path in enumerate(shards)]
    absent = [(path, part) for path, part in absent if not part.is_file()]
    workers = min(ranks.usable_cores(), len(absent) // SHARDS_PER_PROCESS)

    def tell(done: int) -> None:
        report(Progress("indexing shards", done, len(absent), unit="shards"))

    if workers < 2:
        for done, (path, part) in enumerate(absent):
            tell(done)
            _index_shard(path, part, fingerprint)
        return
    # Spawned, for a fork would inherit the locks that torch's threads hold.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_work)
    try:
        for done, _ in enumerate(pool.map(partial(_index_shard, fingerprint=fingerprint), *zip(*absent, strict=True))):
            tell(done + 1)
    except BrokenProcessPool as error:
        raise DataError(f"{parts}: a process that indexed shards was killed; start again, and it goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_work() -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the parent, and end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # of a pool's worker

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.npz"


def _index_shard(path: Path, part: Path, fingerprint: Fingerprint) -> None:
    """Write where the images of one shard are, and what tells each from others. Raises DataError."""
    passed_by = SkippedFiles()
    found = list(read_members(path, passed_by))
    if not found:
        names = ", ".join(f"KEY{suffix}" for suffix in sorted(SUFFIXES))
        told = "".join(f"; {text}" for text in passed_by.texts())
        raise DataError(f"{path}: holds no images; comkd reads members named {names}{told}")
    keys = [_as_bytes(key) for key, _, _ in found]
    hashes = _hashes(keys)
    if twins := _settled(np.argsort(hashes, kind="stable"), hashes, lambda position: found[position][0]):
        raise DataError(f"{path}: holds the sample {found[twins[0]][0]!r} twice; give each a key of its own")
    with written_whole(part) as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            offsets=np.array([offset for _, offset, _ in found], dtype=np.int64),
            sizes=np.array([size for _, _, size in found], dtype=np.int64),
            keys=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_lengths=np.array([len(key) for key in keys], dtype=np.int64),
            hashes=hashes,
            contents=np.frombuffer(b"".join(_content_digests(path, found, fingerprint)), dtype=np.uint8),
            passed_by=np.frombuffer(json.dumps(asdict(passed_by)).encode(), dtype=np.uint8),
        )


def _content_digests(path: Path, found: Sequence[tuple[str, int, int]], fingerprint: Fingerprint) -> Iterator[bytes]:
    """A digest of each image's bytes, or of its shard's size and modification time. Raises DataError."""
    try:
        with path.open("rb") as file:
            if fingerprint == "size_and_time":
                state = os.fstat(file.fileno())
                shard = _content_digest(repr((state.st_size, state.st_mtime_ns)).encode())
                yield from (shard for _ in found)
                return
            for _, offset, size in found:
                file.seek(offset)
                yield _content_digest(file.read(size))
    except OSError as error:
        raise DataError(f"{path}: could not be read: {error.strerror or error}") from error


def _content_digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CONTENT_BYTES).digest()


def read_members(path: Path, passed_by: SkippedFiles | None = None) -> Iterator[tuple[str, int, int]]:
    """The key of each sample of a shard, and where its image begins and how long it is, in bytes.

    Members are grouped as WebDataset groups them: side by side, and called alike up to the first dot. Of
    several images of a sample the first counts. Only headers are read. passed_by: what is no image of the set is
    counted there. Raises DataError for what is no tar, or not a whole one.
    """
    from webdataset.tariterators import base_plus_ext

    passed_by = SkippedFiles() if passed_by is None else passed_by
    current, taken, others, dotted = None, set[str](), Counter[str](), False

    def end_sample() -> None:
        if not taken and not dotted:
            passed_by.add(SkippedFiles(dict(others)))
        others.clear()

    try:
        with path.open("rb") as file:
            start = file.read(8)
            for magic, method in COMPRESSED.items():
                if start.startswith(magic):
                    raise DataError(f"{path}: is compressed ({method}); decompress it: shards are read at random")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
                    key, extension = base_plus_ext(member.name)
                    if member.isdir() or META.match(member.name) or below_junk(member.name):
                        continue
                    suffix = suffix_of(member.name.rpartition("/")[2])
                    if not member.isreg() or key is None:
                        passed_by.add(SkippedFiles({suffix if member.isreg() else f"{suffix} (no regular file)": 1}))
                        continue
                    if key != current:
                        end_sample()
                        current, taken, dotted = key, set(), False
                    extension = extension.lower()
                    if suffix not in SUFFIXES:
                        others[suffix] += 1
                        continue
                    if f".{extension}" != suffix:
                        dotted = True
                        passed_by.add(SkippedFiles(dotted=1, example=member.name))
                        continue
                    if extension in taken or member.issparse():
                        fault = "is stored sparse" if member.issparse() else "is there twice"
                        raise DataError(f"{path}: {member.name} {fault}; write the shard anew")
                    if not taken:
                        yield key, member.offset_data, member.size
                    else:
                        passed_by.further += 1
                    taken.add(extension)
                end_sample()
                # tarfile takes a damaged header for the end; a whole tar ends with a block of zeros.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it is cut off, or damaged")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        where = "" if current is None else f", in or after the sample {current!r}"
        raise DataError(f"{path}: can't be read as a tar{where}: {error}; fetch or write it anew") from error


def _as_bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # as tarfile reads names that are not UTF-8


def _hashes(keys: Sequence[bytes]) -> np.ndarray:
    """64 bits of each key, uint64 (keys,)."""
    joined = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    return np.frombuffer(joined, dtype="<u8")


def _join_parts(shards: Sequence[Path], parts: Path, folder: Path, fingerprint: Fingerprint) -> None:
    """Write the whole index from what is known of each shard. Raises DataError where keys repeat."""
    starts, key_end, passed_by = [0], 0, SkippedFiles()
    names = ("offsets", "sizes", "key_ends", "keys", "hashes", "contents")
    files = {name: (folder / f"{name}.bin").open("wb") for name in names}
    try:
        for number, path in enumerate(shards):
            part = _loaded(path, _part(parts, number), fingerprint)
            part["key_ends"] = key_end + np.cumsum(part.pop("key_lengths"))
            key_end = int(part["key_ends"][-1])
            starts.append(starts[-1] + len(part["key_ends"]))
            passed_by.add(SkippedFiles(**json.loads(part["passed_by"].tobytes())))
            for name, file in files.items():
                file.write(part[name].tobytes())
    finally:
        for file in files.values():
            file.close()
    _mapped(folder / "rows.bin", np.int64, starts[-1], new=True).flush()
    about = {
        "format": INDEX_FORMAT,
        "shards": [str(path) for path in shards],
        "starts": starts,
        "prefixed": False,
        "digest": "",
        "ordered_digest": "",
        "passed_by": asdict(passed_by),
    }
    for prefixed in (False, True):
        about["prefixed"] = prefixed
        write_text(folder / "index.json", json.dumps(about))
        index = ShardIndex(folder)
        if prefixed:
            _hash_prefixed(index, folder)
        ranked = _rank(index, folder)
        if isinstance(ranked, str):
            ordered = _ordered_digest(index, ranked)
            write_text(folder / "index.json", json.dumps({**about, "digest": ranked, "ordered_digest": ordered}))
            (folder / "hashes.bin").unlink()
            return
        first, second = ranked
    raise DataError(
        f"data.shards: {index.shard_of(first)} and {index.shard_of(second)} both hold the sample {index.key(first)}, "
        "and are called alike; rename one of the two, so that its samples are others"
    )


def _loaded(path: Path, part: Path, fingerprint: Fingerprint) -> dict[str, np.ndarray]:
    """What is known of a shard; indexed once more where another process has done with the parts meanwhile."""
    try:
        with np.load(part, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile):
        _index_shard(path, part, fingerprint)
    with np.load(part, allow_pickle=False) as arrays:
        return dict(arrays)


def _hash_prefixed(index: ShardIndex, folder: Path) -> None:
    """Write the hashes anew, of keys with their shards' names before them."""
    hashes = _mapped(folder / "hashes.bin", "<u8", len(index), writable=True)
    for block in _blocks(len(index)):
        hashes[block] = _hashes([_as_bytes(index.key(i)) for i in range(block.start, block.stop)])
    hashes.flush()


def _rank(index: ShardIndex, folder: Path) -> str | tuple[int, int]:
    """Write each image's rank among all, by the hash of its key; a digest of keys and contents in that order.

    Or two images with the same key, where there are such. Hashes are taken range by range, so that memory is
    bounded; keys whose hashes agree are ranked by their text.
    """
    count = len(index)
    hashes = _mapped(folder / "hashes.bin", "<u8", count)
    rows = _mapped(folder / "rows.bin", np.int64, count, writable=True)
    bits = max(1, (count // RANKED_AT_ONCE).bit_length())
    digest, first = hashlib.sha256(), 0
    for number in range(2**bits):
        where = np.concatenate(
            [block.start + np.flatnonzero(hashes[block] >> np.uint64(64 - bits) == number) for block in _blocks(count)]
        )
        found = hashes[where]
        order = np.argsort(found, kind="stable")
        if twins := _settled(order, found, partial(_key_at, index, where)):
            return int(where[twins[0]]), int(where[twins[1]])
        ranks = np.empty(len(where), dtype=np.int64)
        ranks[order] = np.arange(first, first + len(where))
        rows[where] = ranks  # in the order of the file, not of the ranks
        first += len(where)
        contents = index._contents.reshape(count, CONTENT_BYTES)[where][order]
        digest.update(np.column_stack([found[order].view(np.uint8).reshape(-1, 8), contents]).tobytes())
    rows.flush()
    return digest.hexdigest()


def _ordered_digest(index: ShardIndex, digest: str) -> str:
    """Of the images in the order in which the shards hold them."""
    ordered = hashlib.sha256(digest.encode())
    for block in _blocks(len(index)):
        ordered.update(index.rows[block].astype("<i8").tobytes())
    return ordered.hexdigest()


def _key_at(index: ShardIndex, where: np.ndarray, position: int) -> str:
    return index.key(int(where[position]))


def _settled(order: np.ndarray, hashes: np.ndarray, key: Callable[[int], str]) -> tuple[int, int] | None:
    """Bring positions whose hashes agree into the order of their keys, in place; or two whose keys agree."""
    ranked = hashes[order]
    twins = np.flatnonzero(ranked[1:] == ranked[:-1])
    for _, run in groupby(enumerate(twins.tolist()), lambda pair: pair[1] - pair[0]):
        places = [place for _, place in run]
        alike = slice(places[0], places[-1] + 2)
        named = sorted((key(position), position) for position in order[alike].tolist())
        for (name, position), (following, other) in pairwise(named):
            if name == following:
                return position, other
        order[alike] = [position for _, position in named]
    return None


def _blocks(count: int) -> Iterator[slice]:
    """Slices that together are everything, each small enough for memory."""
    for start in range(0, count, RANKED_AT_ONCE):
        yield slice(start, min(start + RANKED_AT_ONCE, count))


def _mapped(path: Path, dtype: Any, count: int, new: bool = False, writable: bool = False) -> np.memmap:
    """A file as an array of so many numbers. Raises ValueError where it is too short."""
    return np.memmap(path, dtype=dtype, mode="w+" if new else "r+" if writable else "r", shape=(count,))


class _Member(BytesIO):
    """An image's bytes, under the name that messages tell."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self._name = name

    def __repr__(self) -> str:
        return self._name


class _OpenFiles:
    """The files that this process read last, held open."""

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
        return file.read(size)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __del__(self) -> None:
        self._close()
