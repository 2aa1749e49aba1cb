"""Hostile archives: zip files of datasets, and tar shards with their index."""

from __future__ import annotations

import io
import json
import random
import stat
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.hostile import mutations
from comkd_cli.data.fetch import unpack
from comkd_cli.data.shard_index import ShardIndex
from comkd_cli.data.shard_indexing import open_index
from comkd_cli.edge.images import UnreadableImage

MEMBERS = ("eurosat/split.json", "eurosat/2750/a.jpg", "__MACOSX/a.jpg", "eurosat/.DS_Store")
OUTSIDE = ("../outside.txt", "/tmp/outside.txt", "a/../../outside.txt", "..\\outside.txt", "C:\\outside.txt", "//x/y")
MOST_BYTES = 2**24  # of an unpacked archive


def archive(rng: random.Random, folder: Path) -> None:
    """The zip file of a dataset; what is unpacked stays below its folder and below the limit."""
    path = folder / "archive.zip"
    path.write_bytes(_zip(rng))
    target = folder / "unpacked"
    target.mkdir()
    try:
        unpack(path, target, lambda done, total: None, MOST_BYTES)
    finally:
        found = [entry for entry in folder.rglob("*") if entry.name != "archive.zip"]
        assert all(entry == target or entry.is_relative_to(target) for entry in found), found
        assert not any(entry.is_symlink() for entry in found), found
        assert sum(entry.stat().st_size for entry in found if entry.is_file()) <= MOST_BYTES


def _zip(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(buffer, "w", method) as opened:
        for name in MEMBERS:
            opened.writestr(name, b"content of a member" * 9)
        for _ in range(rng.randrange(3)):
            _add_hostile_member(rng, opened)
    content = bytearray(buffer.getvalue())
    if rng.random() < 0.15:  # the encrypted flag of the members, in their headers and in the directory
        for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = content.find(magic)
            while at >= 0:
                content[at + place] |= 1
                at = content.find(magic, at + 4)
    return mutations.damaged(rng, bytes(content)) if rng.random() < 0.5 else bytes(content)


def _add_hostile_member(rng: random.Random, opened: zipfile.ZipFile) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        opened.writestr(rng.choice(OUTSIDE), b"outside")
    elif kind == 1:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(link, rng.choice(("/etc/passwd", "../..")))
    elif kind == 2:
        opened.writestr("zeros", bytes(rng.choice((10**5, 2 * 10**7))))
    elif kind == 3:
        name = mutations.text(rng).encode("utf-8", "replace").decode()[:60000]
        opened.writestr(name.partition("\0")[0] or "a", b"x")  # zipfile ends a name at its first zero
    elif kind == 4:
        opened.writestr("eurosat/split.json/below", b"a folder where a file is")
    else:
        opened.writestr("a" * 300, b"a long name")


@cache
def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, "PNG")
    return buffer.getvalue()


def shard(rng: random.Random, folder: Path) -> None:
    """Tar shards that are indexed and read, once more with a damaged index."""
    paths = []
    for number in range(rng.choice((1, 1, 2))):
        path = folder / f"train-{number:04}.tar"
        path.write_bytes(_tar(rng))
        paths.append(path)
    index = open_index(paths, folder / "shards", lambda event: None)
    _read_some(index)
    file = rng.choice([path for path in index.folder.iterdir() if path.is_file()])
    if file.name == "index.json" and rng.random() < 0.7:
        changed = mutations.changed(rng, json.loads(file.read_text()))
        file.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(mutations.damaged(rng, file.read_bytes()))
    _read_some(open_index(paths, folder / "shards", lambda event: None))


def _read_some(index: ShardIndex) -> None:
    for position in range(min(3, len(index))):
        try:
            index.open(position)
        except UnreadableImage:
            continue


def _tar(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as opened:
        for number in range(3):
            _add_member(opened, f"{number:04}.png", _picture())
        for _ in range(rng.randrange(4)):
            _add_hostile_tar_member(rng, opened)
    content = buffer.getvalue()
    if rng.random() < 0.05:
        content = _repeated_headers()
    return mutations.damaged(rng, content) if rng.random() < 0.5 else content


def _add_member(opened: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, held in fields.items():
        setattr(member, field, held)
    opened.addfile(member, io.BytesIO(content))


def _add_hostile_tar_member(rng: random.Random, opened: tarfile.TarFile) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        _add_member(opened, rng.choice(OUTSIDE) + ".png", _picture())
    elif kind == 1:
        link = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE))
        _add_member(opened, "link.png", b"", type=link, linkname="/etc/passwd")
    elif kind == 2:
        name = mutations.text(rng).encode("utf-8", "replace").decode()
        _add_member(opened, f"{name}.png", _picture())
    elif kind == 3:
        _add_member(opened, "0001.png", _picture())
    else:
        _add_member(opened, "0009.jpg", rng.choice((b"", b"no image", _picture())))


@cache
def _repeated_headers() -> bytes:
    """Two thousand headers, each of which says that it describes the next."""
    member = tarfile.TarInfo("a.png")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 4
    return (member.tobuf(tarfile.GNU_FORMAT) + b"a\0\0\0".ljust(512, b"\0")) * 2000
