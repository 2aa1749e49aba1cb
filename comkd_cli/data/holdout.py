"""Which images are held out of training if a dataset has no test split: a function of each image's content.

An image is held out if the first 64 bits of the digest of its content, as a fraction of 2^64, are below the share. So
copies of an image are on one side, and images that are added move no other image. If there are labels, the smallest
classes need exceptions to have images on both sides.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from comkd_cli.data.contents import Fingerprint
from comkd_cli.recipe.data import UNLABELLED

DIGEST_BYTES = 16
"""Of the digests by which images are compared; longer ones are cut."""


@dataclass(frozen=True)
class Holdout:
    """How the held-out images of a dataset are chosen; student.pt keeps it, and later commands choose the same ones."""

    percent: float
    """The share of the images, in percent."""
    fingerprint: Fingerprint = "contents"
    """What images are compared by: their contents, or with `size_and_time` their file names and sizes."""
    exceptions: Mapping[str, bool] = field(default_factory=dict)
    """By digest, in hexadecimal: whether images are held out that the share alone would decide differently."""

    @property
    def threshold(self) -> int:
        """The least 64-bit number that is not held out."""
        return int(self.percent / 100 * 2**64)

    def holds_out(self, digest: bytes) -> bool:
        """Whether the images with this digest are held out."""
        exception = self.exceptions.get(digest[:DIGEST_BYTES].hex()) if self.exceptions else None
        return int.from_bytes(digest[:8], "big") < self.threshold if exception is None else exception

    def held_out(self, digests: np.ndarray) -> np.ndarray:
        """As `holds_out` without exceptions, bool (images,), for digests as uint8 (images, at least 8)."""
        numbers = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
        return np.asarray(numbers < np.uint64(self.threshold))


def stratified(
    percent: float, fingerprint: Fingerprint, digests: Sequence[bytes], labels: Sequence[int] | None
) -> Holdout:
    """The choice for images with these digests, with the exceptions that their labels need.

    Of a class with two or more distinct images at least one is held out and at least one is not, as far as images with
    two labels permit; the only image of a class is not. An image of one class is preferred as an exception, and of
    these the one that is nearest to the threshold. Images without a label do not form a class.
    """
    rule = Holdout(percent, fingerprint)
    if labels is None:
        return rule
    classes: dict[int, set[bytes]] = defaultdict(set)
    for digest, label in zip(digests, labels, strict=True):
        classes[label].add(digest[:DIGEST_BYTES])
    shared = Counter(digest for members in classes.values() for digest in members)
    exceptions: dict[bytes, bool] = {}
    classes.pop(UNLABELLED, None)
    for _, members in sorted(classes.items()):
        held = {digest for digest in members if exceptions.get(digest, rule.holds_out(digest))}
        if held and len(members) == len(held):
            exceptions[min(held, key=lambda digest: (shared[digest], _reversed(digest)))] = False
        elif not held and len(members) > 1:
            exceptions[min(members, key=lambda digest: (shared[digest], digest))] = True
    return Holdout(percent, fingerprint, {digest.hex(): held for digest, held in sorted(exceptions.items())})


def name_and_size_digest(key: str, size: int) -> bytes:
    """A digest of a file's name, without its folders, and its size in bytes; 16 bytes."""
    name = key.rpartition("/")[2].encode("utf-8", "surrogatepass")
    return hashlib.sha256(name + b"\0" + str(size).encode()).digest()[:DIGEST_BYTES]


def _reversed(digest: bytes) -> bytes:
    """A digest whose order among others is the opposite one."""
    return bytes(255 - byte for byte in digest)
