"""Files with the same bytes, found by size and digest."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from comkd_cli.events import Progress, Report
from comkd_cli.runtime import ranks

END_BYTES = 32_768  # of a file's start and of its end, which are compared before whole files are
READ_BYTES = 1 << 20
FILES_AT_ONCE = 256


def same_contents(paths: Sequence[str], sizes: Sequence[int], report: Report) -> list[list[int]]:
    """The positions of files with the same bytes, in groups of two or more. Empty files count as different."""
    of_size: dict[object, list[int]] = defaultdict(list)
    for i, size in enumerate(sizes):
        if size:
            of_size[size].append(i)
    groups = [group for group in of_size.values() if len(group) > 1]
    # Files of formats without compression are often all of one size: their ends tell most of them apart.
    groups = _split_by_digest(groups, paths, whole=False, report=report)
    small = [group for group in groups if sizes[group[0]] <= 2 * END_BYTES]
    large = [group for group in groups if sizes[group[0]] > 2 * END_BYTES]
    return sorted([*small, *_split_by_digest(large, paths, whole=True, report=report)])


def _split_by_digest(
    groups: Sequence[Sequence[int]], paths: Sequence[str], whole: bool, report: Report
) -> list[list[int]]:
    """Groups of those files of each group that have the same digest, of their ends or of the whole files."""
    wanted = [(number, i) for number, group in enumerate(groups) for i in group]
    of_digest: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    parts = [wanted[start : start + FILES_AT_ONCE] for start in range(0, len(wanted), FILES_AT_ONCE)]
    done = 0
    with ThreadPoolExecutor(ranks.usable_cores()) as pool:
        found = pool.map(lambda part: [_digest(paths[i], whole) for _, i in part], parts)
        for part, digests in zip(parts, found, strict=True):
            for (number, i), digest in zip(part, digests, strict=True):
                if digest is not None:
                    of_digest[number, digest].append(i)
            done += len(part)
            report(Progress("comparing files of the same size", done, len(wanted)))
    return [group for group in of_digest.values() if len(group) > 1]


def _digest(path: str, whole: bool) -> bytes | None:
    """A digest of a file, or of its first and last bytes; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            if not whole:
                size = os.fstat(file.fileno()).st_size
                digest.update(file.read(2 * END_BYTES if size <= 2 * END_BYTES else END_BYTES))
                if size > 2 * END_BYTES:
                    file.seek(size - END_BYTES)
                    digest.update(file.read(END_BYTES))
            else:
                while block := file.read(READ_BYTES):
                    digest.update(block)
    except OSError:
        return None
    return digest.digest()
