"""Images in tar shards, in WebDataset's layout, as a source: found on this machine or brought from elsewhere."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import overload
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from comkd_cli.data.class_names import clean_class_names
from comkd_cli.data.contents import Fingerprint
from comkd_cli.data.shard_index import ShardIndex, open_index
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Progress, Report


def shard_source(
    pattern: str,
    class_names: Sequence[str],
    template: str,
    data_root: Path,
    home: Path,
    report: Report,
    fetch: bool = False,
    fingerprint: Fingerprint = "contents",
) -> Source:
    """The images of the shards that a pattern names, unlabelled.

    home: where the index is kept, and shards that are brought from elsewhere. fetch: bring those that are not
    there yet, which for `pipe:` runs a command. fingerprint: what the index tells images apart by. Members that are no
    images are reported. Raises DataError, naming the shard.
    """
    names = clean_class_names(class_names, "data.classes")
    shards = find_shards(pattern, data_root, home / "fetched", report, fetch)
    index = open_index(shards, home, report, fingerprint)
    name = source_name(shards)
    for text in index.passed_by.texts():
        report(Notice(f"{name}: {text}"))
    return Source(name, tuple(names), template, shard_images(index), None)


def find_shards(pattern: str, data_root: Path, fetched: Path, report: Report, fetch: bool = False) -> list[Path]:
    """The local file of each shard that a pattern names, in its order.

    Relative paths are taken from the current directory, then from the data root, all from the same one of the
    two. Remote shards are brought into `fetched` once. Raises DataError, naming the first that is missing.
    """
    from webdataset.cache import islocal
    from webdataset.shardlists import expand_urls

    try:
        urls: list[str] = expand_urls(pattern)
    except (AssertionError, ValueError) as error:
        raise DataError(f"data.shards: {pattern!r} can't be expanded: {error}") from error
    if repeated := [url for url, times in Counter(urls).items() if times > 1]:
        raise DataError(f"data.shards: {pattern} names {repeated[0]} more than once")
    local = [url for url in urls if islocal(url)]
    paths = dict(zip(local, _on_this_machine(local, pattern, data_root), strict=True))
    paths |= _brought([url for url in urls if url not in paths], fetched, report, fetch)
    return [paths[url] for url in urls]


def _on_this_machine(urls: Sequence[str], pattern: str, data_root: Path) -> list[Path]:
    given = [Path(urlparse(url).path) if url.startswith("file:") else Path(url).expanduser() for url in urls]
    missing: list[Path] = []
    for paths in (given, [data_root / path for path in given]):
        absent = [path for path in paths if not path.is_file()]
        if not absent:
            return paths
        if not missing or len(absent) < len(missing):
            missing = absent
    raise DataError(
        f"data.shards: {pattern}: {len(missing)} of {len(given)} shards are missing, the first is {missing[0]}; "
        "correct the pattern (braces such as {0000..0099} stand for many, * for none), or give --data-root"
    )


def _brought(urls: Sequence[str], fetched: Path, report: Report, fetch: bool) -> dict[str, Path]:
    """The local copies of remote shards, fetched now where they are not there yet."""
    from webdataset.cache import FileCache

    # A folder for each address: shards of different places may be called alike.
    copies = {url: fetched / hashlib.sha256(url.encode()).hexdigest()[:16] / _place(url) for url in urls}
    absent = [url for url, copy in copies.items() if not copy.is_file()]
    if absent and not fetch:
        raise DataError(
            f"data.shards: {len(absent)} of {len(urls)} remote shards are not below {fetched} yet, the first is "
            f"{absent[0]}; `comkd distill` fetches what its recipe names, a dry run and other commands fetch nothing"
        )
    for number, url in enumerate(absent):
        report(Progress("fetching shards", number, len(absent), unit="shards"))
        copy = copies[url]
        try:
            FileCache(str(copy.parent), url_to_name=lambda _, name=copy.name: name, validator=None).get_file(url)
            whole = tarfile.is_tarfile(copy)
        except (OSError, ValueError, AssertionError) as error:
            raise DataError(f"data.shards: {url} can't be fetched: {error}") from error
        if not whole:
            copy.unlink()
            raise DataError(f"data.shards: {url} is no tar, or not reachable; correct the address")
    return copies


def _place(url: str) -> str:
    """The file's name within an address or a command, and its folder's, such as train/0001.tar."""
    found: list[str] = re.findall(r"\w[\w.-]*/\w[\w.-]*\.tar\b", url)
    return found[-1] if found else "shards/shard.tar"


def source_name(shards: Sequence[Path]) -> str:
    """What shards are called alike, `train` of train-0000.tar to train-0099.tar; else their folder."""
    names = {path.stem.rstrip("0123456789") for path in shards}
    for name in (names.pop() if len(names) == 1 else "", shards[0].resolve().parent.name):
        if clean := re.sub(r"[^\w.-]+", "_", name).strip("._-"):
            return clean
    return "shards"


class ShardKeys(Sequence[str]):
    """The keys of all images of shards, each read from the index when it is asked for."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, position: int) -> str: ...

    @overload
    def __getitem__(self, position: slice) -> tuple[str, ...]: ...

    def __getitem__(self, position: int | slice) -> str | tuple[str, ...]:
        positions = range(len(self))[position]  # bounds, negative positions and slices as a tuple has them
        return self._index.key(positions) if isinstance(positions, int) else tuple(map(self._index.key, positions))


@dataclass(frozen=True)
class ShardImages(ImageSet):
    """The images of shards: opened by position, and nothing of them held in memory."""

    index: ShardIndex = field(kw_only=True)

    def open(self, index: int) -> Image.Image:
        """The image at a position, as RGB. Raises predictor.UnreadableImage."""
        return self.index.open(index)

    def subset(self, indices: list[int]) -> ImageSet:
        """The images at these positions, in this order; their keys are held in memory."""
        positions = {self.index.key(i): i for i in indices}
        return ImageSet(
            keys=tuple(map(self.index.key, indices)),
            labels=None,
            open_key=partial(_open_one, self.index, positions),
            contents=_ShardContents(self.index, positions),
        )

    @property
    def digest(self) -> str:
        """A digest of keys and contents that does not depend on which shard holds what."""
        return self.index.digest

    @property
    def ordered_digest(self) -> str:
        """As `digest`, and different where the images are packed in another order."""
        return self.index.ordered_digest

    def spaced(self, most: int) -> Sequence[int]:
        """The positions of about `most` images, the same images in whatever shards they are."""
        return self.index.spaced(most)

    @property
    def rows(self) -> np.ndarray:
        """The rank of each image among all, int64 (images,), the same in whatever shards they are."""
        return self.index.rows

    @property
    def runs_on_disk(self) -> np.ndarray:
        """Where each shard begins, and where the last ends, int64 (shards + 1,)."""
        return self.index.starts


def shard_images(index: ShardIndex) -> ShardImages:
    """Every image of an index, unlabelled."""
    return ShardImages(ShardKeys(index), None, _open_by_position, index=index)


@dataclass(frozen=True)
class _ShardContents:
    """The contents of some images of an index."""

    index: ShardIndex
    positions: dict[str, int]

    def digests(self, keys: Sequence[str]) -> Iterator[bytes]:
        return (self.index.content(self.positions[key]) for key in keys)


def _open_by_position(key: str) -> Image.Image:
    raise TypeError(f"{key}: an image of shards is opened by its position")


def _open_one(index: ShardIndex, positions: dict[str, int], key: str) -> Image.Image:
    return index.open(positions[key])
