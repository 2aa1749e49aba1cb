"""The files that a set of images is decoded from, and what identifies the content of each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from comkd_cli.data.contents import NO_REGULAR_FILE, FileContents, Fingerprint, digest_of_state
from comkd_cli.data.copies import KEY_BYTES, Originals
from comkd_cli.data.named_bytes import NamedBytes
from comkd_cli.data.shard_index import ShardIndex, content_digest, state_digest
from comkd_cli.data.shard_indexing import key_bytes
from comkd_cli.data.shards import ShardImages
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import UnreadableImage


@dataclass(frozen=True, eq=False)
class FolderOriginals:
    """Image files below a folder."""

    root: Path
    keys: Sequence[str]
    digests: np.ndarray
    """uint8 (images, 16): of each file's content, or of its size and time."""
    fingerprint: Fingerprint

    def key(self, index: int) -> bytes:
        """The digest of the file; if no file is read for it, with the file's path."""
        digest = self.digests[index].tobytes()
        return digest if self.fingerprint == "contents" else _joined(os.fsencode(self._path(index)), digest)

    def read(self, index: int) -> NamedBytes:
        """An image's file. Raises UnreadableImage."""
        path = self._path(index)
        with open_regular(path) as file:
            try:
                return NamedBytes(str(path), file.read())
            except OSError as error:
                raise UnreadableImage(f"{path}: {error.strerror or error}") from error

    def has_key(self, index: int, content: bytes) -> bool:
        """Whether the file is still the one that its digest was made of."""
        if self.fingerprint == "contents":
            digest = hashlib.sha256(content).digest()
        else:
            digest = digest_of_state(str(self._path(index)))
        known: bytes = self.digests[index].tobytes()
        return digest[:KEY_BYTES] == known

    def _path(self, index: int) -> Path:
        return self.root.absolute() / self.keys[index]


@dataclass(frozen=True, eq=False)
class ShardOriginals:
    """Images of tar shards."""

    index: ShardIndex
    fingerprint: Fingerprint

    def key(self, index: int) -> bytes:
        """The digest of the image's bytes; if they are not read for it, of its shard with its place in it."""
        digest = self.index.content(index)
        if self.fingerprint == "contents":
            return digest
        return _joined(os.fsencode(self.index.shard_of(index)), key_bytes(self.index.key(index)), digest)

    def read(self, index: int) -> NamedBytes:
        """An image's file. Raises UnreadableImage."""
        return self.index.read(index)

    def has_key(self, index: int, content: bytes) -> bool:
        """Whether the image is still the one that its digest was made of."""
        if self.fingerprint == "contents":
            return content_digest(content) == self.index.content(index)
        try:
            return state_digest(self.index.shard_of(index).stat()) == self.index.content(index)
        except OSError:  # removed since it was read
            return False


def originals_of(images: ImageSet, fingerprint: Fingerprint) -> Originals | None:
    """The files of a set, with their digests; None if it has no files. Reads files that are not remembered."""
    if isinstance(images, ShardImages):
        return ShardOriginals(images.index, fingerprint)
    if not isinstance(images.contents, FileContents):
        return None
    joined = b"".join(digest[:KEY_BYTES] for digest in images.content_digests())
    digests = np.frombuffer(joined, np.uint8).reshape(len(images), KEY_BYTES)
    return FolderOriginals(images.contents.root, images.keys, digests, fingerprint)


def has_files(images: ImageSet) -> bool:
    """Whether the images of a set are decoded from files."""
    return isinstance(images, ShardImages) or isinstance(images.contents, FileContents)


def open_original(images: ImageSet, index: int) -> BinaryIO:
    """The file of an image of a set that has files. Raises UnreadableImage."""
    if isinstance(images, ShardImages):
        return images.index.read(index)
    assert isinstance(images.contents, FileContents)  # see `has_files`
    return open_regular(images.contents.root / images.keys[index])


def open_regular(path: Path) -> BinaryIO:
    """A file to read, unless it is a pipe or a device. Raises UnreadableImage."""
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise UnreadableImage(f"{path}: {NO_REGULAR_FILE}")
    try:
        return path.open("rb")
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror or error}") from error


def _joined(*parts: bytes) -> bytes:
    """A digest of some parts."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()
