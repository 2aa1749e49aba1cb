"""Images in tar shards, in WebDataset's layout, as a source: local shards, or remote ones that are fetched once."""

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
from comkd_cli.data.shard_index import ShardIndex
from comkd_cli.data.shard_indexing import open_index
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Progress, Report


@dataclass(frozen=True)
class ShardStore:
    """Opens shards: looks for local ones, fetches remote ones once, and keeps their index."""

    home: Path
    """Holds the indexes, and fetched shards."""
    data_root: Path
    """Where relative paths are looked for, after the current directory."""
    report: Report
    fetch: bool = False
    """Fetch remote shards that are not in `home` yet, which runs the command of a `pipe:`."""
    fingerprint: Fingerprint = "contents"
    """What the index compares images by."""
    most_pixels: int | None = None
    """Of an image; see `open_image`."""

    def source(self, pattern: str, class_names: Sequence[str], template: str) -> Source:
        """The images of the shards that a pattern names, unlabelled.

        Members that are skipped are reported. Raises DataError, naming the shard.
        """
        names = clean_class_names(class_names, "data.classes")
        shards = self.find(pattern)
        index = open_index(shards, self.home, self.report, self.fingerprint)
        name = source_name(shards)
        for text in index.skipped.texts():
            self.report(Notice(f"{name}: {text}"))
        return Source(name, tuple(names), template, shard_images(index, self.most_pixels), None)

    def find(self, pattern: str) -> list[Path]:
        """The local file of each shard that a pattern names, in its order.

        Relative paths are all resolved in the current directory, or all in the data root. Raises DataError, naming
        the first missing shard.
        """
        from webdataset.cache import islocal
        from webdataset.shardlists import expand_urls

        try:
            urls: list[str] = expand_urls(pattern)
        except (AssertionError, ValueError) as error:
            raise DataError(f"could not be expanded ({error})", field="data.shards", found=pattern) from error
        if repeated := [url for url, times in Counter(urls).items() if times > 1]:
            raise DataError(f"{pattern} names a shard more than once", field="data.shards", found=repeated[0])
        local = [url for url in urls if islocal(url)]
        paths = dict(zip(local, self._local_files(local, pattern), strict=True))
        paths |= self._fetched_files([url for url in urls if url not in paths])
        return [paths[url] for url in urls]

    def _local_files(self, urls: Sequence[str], pattern: str) -> list[Path]:
        given = [Path(urlparse(url).path) if url.startswith("file:") else Path(url).expanduser() for url in urls]
        missing: list[Path] = []
        for paths in (given, [self.data_root / path for path in given]):
            absent = [path for path in paths if not path.is_file()]
            if not absent:
                return paths
            if not missing or len(absent) < len(missing):
                missing = absent
        raise DataError(
            f"{pattern}: {len(missing)} of {len(given)} shards are missing, the first is",
            field="data.shards",
            found=missing[0],
            remedy="correct the pattern ({0000..0099} names many shards, * is not expanded), or set --data-root",
        )

    def _fetched_files(self, urls: Sequence[str]) -> dict[str, Path]:
        """The local copies of remote shards, by address. Raises DataError."""
        fetched = self.home / "fetched"
        # A folder for each address: shards of different places may have the same name.
        copies = {url: fetched / hashlib.sha256(url.encode()).hexdigest()[:16] / _file_name(url) for url in urls}
        absent = [url for url, copy in copies.items() if not copy.is_file()]
        if absent and not self.fetch:
            raise DataError(
                f"{len(absent)} of {len(urls)} remote shards are not in {fetched} yet, the first is",
                field="data.shards",
                found=absent[0],
                remedy="run `comkd distill`, which fetches them; a dry run and other commands fetch nothing",
            )
        for number, url in enumerate(absent):
            self.report(Progress("fetching shards", number, len(absent), unit="shards"))
            _fetch(url, copies[url])
        return copies


def _fetch(url: str, copy: Path) -> None:
    from webdataset.cache import FileCache

    try:
        FileCache(str(copy.parent), url_to_name=lambda _: copy.name, validator=None).get_file(url)
        whole = tarfile.is_tarfile(copy)
    except (OSError, ValueError, AssertionError) as error:
        raise DataError(f"{url} could not be fetched", field="data.shards", found=str(error)) from error
    if not whole:
        copy.unlink()
        raise DataError(
            "is not a tar, or could not be reached", field="data.shards", found=url, remedy="correct the address"
        )


def _file_name(url: str) -> str:
    """The file's name within an address or a command, and its folder's, such as train/0001.tar."""
    found: list[str] = re.findall(r"\w[\w.-]*/\w[\w.-]*\.tar\b", url)
    return found[-1] if found else "shards/shard.tar"


def source_name(shards: Sequence[Path]) -> str:
    """The common part of the shards' names, `train` of train-0000.tar to train-0099.tar; else their folder's name."""
    names = {path.stem.rstrip("0123456789") for path in shards}
    for name in (names.pop() if len(names) == 1 else "", shards[0].resolve().parent.name):
        if clean := re.sub(r"[^\w.-]+", "_", name).strip("._-"):
            return clean
    return "shards"


class ShardKeys(Sequence[str]):
    """The keys of all images of shards, each read from the index on access."""

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
    most_pixels: int | None = field(default=None, kw_only=True)
    """Of an image; see `open_image`."""

    def open(self, index: int) -> Image.Image:
        """The image at a position, as RGB. Raises UnreadableImage."""
        return self.index.open(index, self.most_pixels)

    def subset(self, indices: list[int]) -> ImageSet:
        """The images at these positions, in this order; their keys are held in memory."""
        positions = {self.index.key(i): i for i in indices}
        return ImageSet(
            keys=tuple(map(self.index.key, indices)),
            labels=None,
            open_key=partial(_open_one, self.index, positions, self.most_pixels),
            contents=_ShardContents(self.index, positions),
        )

    @property
    def digest(self) -> str:
        """A digest of keys and contents that does not depend on which shard holds what."""
        return self.index.digest

    @property
    def ordered_digest(self) -> str:
        """As `digest`, and different if the images are packed in another order."""
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


def shard_images(index: ShardIndex, most_pixels: int | None = None) -> ShardImages:
    """Every image of an index, unlabelled."""
    return ShardImages(ShardKeys(index), None, _open_by_position, index=index, most_pixels=most_pixels)


@dataclass(frozen=True)
class _ShardContents:
    """The contents of some images of an index."""

    index: ShardIndex
    positions: dict[str, int]

    def digests(self, keys: Sequence[str]) -> Iterator[bytes]:
        return (self.index.content(self.positions[key]) for key in keys)


def _open_by_position(key: str) -> Image.Image:
    raise TypeError(f"{key}: an image of shards is opened by its position")


def _open_one(index: ShardIndex, positions: dict[str, int], most_pixels: int | None, key: str) -> Image.Image:
    return index.open(positions[key], most_pixels)
