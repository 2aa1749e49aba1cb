"""The members of a tar shard, read as WebDataset reads them: which are images, and where each begins."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from comkd_cli.data.image_files import SUFFIXES, below_junk, skipped_text, suffix_of
from comkd_cli.errors import DataError

# Names that WebDataset itself skips: of the whole archive, not of a sample.
META = re.compile(r"__[^/]*__($|/)")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

ImageMember = tuple[str, int, int]
"""The key of a sample, and where its image begins and how long it is, in bytes."""


@dataclass
class SkippedFiles:
    """Members of shards that are skipped although a user might think that they are images."""

    others: dict[str, int] = field(default_factory=dict)
    """Members of samples that have no image, by suffix."""
    dotted: int = 0
    """Images whose names have a further dot, such as a.b.jpg: to WebDataset the field `b.jpg` of the sample `a`."""
    example: str = ""
    """The name of the first of those."""
    further: int = 0
    """Images of a sample after its first."""

    def add(self, more: SkippedFiles) -> None:
        """Add the counts of another shard."""
        self.others = dict(Counter(self.others) + Counter(more.others))
        self.dotted += more.dotted
        self.example = self.example or more.example
        self.further += more.further

    def texts(self) -> list[str]:
        """A sentence for each kind that was found."""
        found = []
        if self.others:
            found.append(f"in samples without an image, {skipped_text(self.others, 'member')}")
        if self.dotted:
            found.append(
                f"{self.dotted:,} images such as {self.example} are skipped: a key ends at the first dot of a "
                "name, so they are fields of a sample; rename them to use them as images"
            )
        if self.further:
            found.append(f"{self.further:,} images are skipped: only the first image of a sample is used")
        return found


def read_members(path: Path, skipped: SkippedFiles | None = None) -> Iterator[ImageMember]:
    """The key of each sample of a shard, and where its image begins and how long it is, in bytes.

    Members are grouped as WebDataset groups them: side by side, with one name up to the first dot. The first image of
    a sample counts. Only headers are read. skipped: counts the members that are skipped. Raises DataError for a file
    that is not a tar, or not a complete one.
    """
    return _Shard(path, SkippedFiles() if skipped is None else skipped).images()


class _Shard:
    """One pass over the members of a shard."""

    def __init__(self, path: Path, skipped: SkippedFiles) -> None:
        self._path, self._skipped = path, skipped
        self._key: str | None = None
        """Of the current sample."""
        self._extensions: set[str] = set()
        """Of its images so far."""
        self._others: Counter[str] = Counter()
        self._has_dotted = False

    def images(self) -> Iterator[ImageMember]:
        try:
            with self._path.open("rb") as file:
                self._check_uncompressed(file)
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
                        if self._is_first_image(member) and self._key is not None:
                            yield self._key, member.offset_data, member.size
                    self._end_sample()
                    # tarfile treats a damaged header as the end; a whole tar ends with a block of zeros.
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        raise tarfile.ReadError("it is truncated or damaged")
        # RecursionError: of thousands of headers each of which describes the next.
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
            where = "" if self._key is None else f" in or after the sample {self._key!r}"
            raise DataError(
                f"could not be read as a tar{where}",
                path=self._path,
                found=str(error),
                remedy="download or write it again",
            ) from error

    def _check_uncompressed(self, file: BinaryIO) -> None:
        start = file.read(8)
        for magic, method in COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(
                    f"is compressed ({method})",
                    path=self._path,
                    remedy="decompress it: comkd reads the images of a shard in random order",
                )
        file.seek(0)

    def _is_first_image(self, member: tarfile.TarInfo) -> bool:
        """Whether a member is the image of its sample. Counts what is skipped. Raises DataError."""
        from webdataset.tariterators import base_plus_ext

        if member.isdir() or META.match(member.name) or below_junk(member.name):
            return False
        key, extension = base_plus_ext(member.name)
        suffix = suffix_of(member.name.rpartition("/")[2])
        if not member.isreg() or key is None:
            self._skipped.add(SkippedFiles({suffix if member.isreg() else f"{suffix} (no regular file)": 1}))
            return False
        if key != self._key:
            self._end_sample()
            self._key = key
        if suffix not in SUFFIXES:
            self._others[suffix] += 1
            return False
        if f".{extension.lower()}" != suffix:
            self._has_dotted = True
            self._skipped.add(SkippedFiles(dotted=1, example=member.name))
            return False
        return self._add_image(member, suffix)

    def _add_image(self, member: tarfile.TarInfo, suffix: str) -> bool:
        """Add an image to the current sample; whether it is the first. Raises DataError."""
        if suffix in self._extensions or member.issparse():
            problem = "is stored as a sparse file" if member.issparse() else "is in the shard twice"
            raise DataError(problem, path=self._path, field=member.name, remedy="write the shard again")
        self._extensions.add(suffix)
        if len(self._extensions) > 1:
            self._skipped.further += 1
        return len(self._extensions) == 1

    def _end_sample(self) -> None:
        if not self._extensions and not self._has_dotted:
            self._skipped.add(SkippedFiles(dict(self._others)))
        self._others.clear()
        self._extensions.clear()
        self._has_dotted = False
