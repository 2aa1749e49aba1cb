"""Fetching from a Hub of our own on 127.0.0.1, found by HF_ENDPOINT, as a real process."""

import errno
import hashlib
import io
import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from comkd_cli.data.check import Check
from comkd_cli.data.fetch import MIRROR, fetch_dataset, unpack
from comkd_cli.errors import DataError, WriteError
from comkd_cli.recipe.catalog import CATALOG
from tests import warm
from tests.hub import Hub, hub


def archive(entries: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in entries.items():
            opened.writestr(name, content)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            opened.writestr(info, target)
    return buffer.getvalue()


def eurosat(top: str, padding_bytes: int = 0) -> bytes:
    """An archive with an image a split, its top folder called `top`."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(picture, "JPEG")
    names = {
        "train": ["A/1.jpg", 0, "Annual Crop"],
        "val": ["A/2.jpg", 0, "Annual Crop"],
        "test": ["B/1.jpg", 1, "Forest"],
    }
    entries = {f"{top}2750/{name}": picture.getvalue() for name, _, _ in names.values()}  # type: ignore[misc]
    entries[f"{top}split_zhou_EuroSAT.json"] = json.dumps({split: [entry] for split, entry in names.items()}).encode()
    if padding_bytes:
        entries[f"{top}padding.bin"] = os.urandom(padding_bytes)
    return archive(entries)


@pytest.fixture(name="hub")
def hub_fixture() -> Iterator[tuple[str, type[Hub]]]:
    with hub() as serving:
        yield serving


def fetch(url: str, folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1"}
    command = ("datasets", "fetch", *names, "--data-root", folder / "data", "--json")
    return warm.run(*command, cwd=folder, env=environment, hub=True)


@pytest.mark.parametrize("top", ["eurosat/", "", "EuroSAT_full/", "outer/eurosat/"])
def test_a_data_set_is_fetched_unpacked_and_checked_whatever_its_top_folder(
    hub: tuple[str, type[Hub]], tmp_path: Path, top: str
) -> None:
    url, handler = hub
    handler.files[f"{MIRROR}/eurosat.zip"] = eurosat(top)
    done = fetch(url, tmp_path, "eurosat")
    (found,) = json.loads(done.stdout)
    assert (tmp_path / "data/eurosat/2750/A/1.jpg").is_file(), done.stderr
    assert (found["train"], found["val"], found["test"], found["missing_images"]) == (1, 1, 1, 0)
    # Three images are not EuroSAT: the check that ends a fetch says so.
    assert done.returncode == 1
    assert "still not ready: eurosat" in done.stderr
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["eurosat"]


def test_a_file_that_is_not_what_the_hub_announced_is_refused(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    url, handler = hub
    handler.files[f"{MIRROR}/eurosat.zip"], handler.announced[f"{MIRROR}/eurosat.zip"] = (
        eurosat("eurosat/"),
        b"something else",
    )
    done = fetch(url, tmp_path, "eurosat")
    assert done.returncode == 1
    assert "sha256 differs" in done.stderr
    assert list((tmp_path / "data").glob("*")) == []


@pytest.mark.slow
def test_an_interrupted_download_resumes_where_it_stopped(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    url, handler = hub
    content = eurosat("eurosat/", padding_bytes=30 * 2**20)  # the client writes 10 MiB at a time
    handler.files[f"{MIRROR}/eurosat.zip"] = content
    handler.cut_after = 25 * 2**20
    assert fetch(url, tmp_path, "eurosat").returncode == 1
    handler.cut_after = None
    fetch(url, tmp_path, "eurosat")
    assert (tmp_path / "data/eurosat/2750/A/1.jpg").is_file()
    assert any(asked and not asked.startswith("bytes=0-") for _, asked in handler.requests)


def test_what_killed_downloads_left_is_removed(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    url, handler = hub
    content = eurosat("eurosat/")
    handler.files[f"{MIRROR}/eurosat.zip"] = content
    blobs = tmp_path / f"hub/hub/models--{MIRROR.replace('/', '--')}/blobs"
    blobs.mkdir(parents=True)
    own = hashlib.sha256(content).hexdigest()
    for name in (f"{own}.5162f42c.incomplete", "another.5162f42c.incomplete"):
        (blobs / name).write_bytes(b"a part")
    unpacked = tmp_path / "data/.eurosat.abcdefgh/new"
    unpacked.mkdir(parents=True)
    (unpacked / "1.jpg").write_bytes(b"a part")
    fetch(url, tmp_path, "eurosat")
    assert sorted(path.name for path in blobs.iterdir()) == sorted([own, "another.5162f42c.incomplete"])
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["eurosat"]


def test_what_was_left_beside_a_dataset_that_is_ready_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ready = Check("eurosat", "ready", "eurosat", 2, 2, 2, 2, 0, None, (), (), "")
    monkeypatch.setattr("comkd_cli.data.fetch.check_dataset", lambda *_: ready)
    (tmp_path / "eurosat").mkdir()
    (tmp_path / ".eurosat.abcdefgh").mkdir()  # of a process that was killed while it removed this folder
    assert fetch_dataset(CATALOG["eurosat"], tmp_path) is ready
    assert [path.name for path in tmp_path.iterdir()] == ["eurosat"]


def test_what_the_hub_does_not_have_is_one_message(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    done = fetch(hub[0], tmp_path, "eurosat")
    assert done.returncode == 1
    assert "eurosat.zip: could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_imagenet_is_told_where_it_comes_from(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    done = fetch(hub[0], tmp_path, "imagenet")
    assert done.returncode == 1
    assert "image-net.org" in done.stderr
    assert "classnames.txt" in done.stderr


def unpacked(folder: Path, content: bytes, most_bytes: int = 1000) -> list[str]:
    """What an archive leaves in a target folder, which alone may change."""
    path, target = folder / "a.zip", folder / "target"
    path.write_bytes(content)
    target.mkdir()
    try:
        unpack(path, target, lambda done, total: None, most_bytes)
    finally:
        assert sorted(entry.name for entry in folder.iterdir()) == ["a.zip", "target"]
    assert not any(entry.is_symlink() for entry in target.rglob("*"))
    return sorted(entry.relative_to(target).as_posix() for entry in target.rglob("*") if entry.is_file())


@pytest.mark.parametrize(
    "content",
    [
        archive({"../outside.txt": b"x"}),
        archive({"/absolute.txt": b"x"}),
        archive({"a/../../outside.txt": b"x"}),
        archive({}, {"link": "/etc/passwd"}),
    ],
)
def test_no_archive_reaches_beyond_the_folder(tmp_path: Path, content: bytes) -> None:
    assert len(unpacked(tmp_path, content)) == 1


def understated(content: bytes, said: int) -> bytes:
    """The archive of one stored file with another size in both of its headers."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        (member,) = opened.infolist()
    return content.replace(member.file_size.to_bytes(4, "little"), said.to_bytes(4, "little"))


def encrypted(content: bytes) -> bytes:
    """The archive with the flag of an encrypted member in both of its headers."""
    changed = bytearray(content)
    changed[content.index(b"PK\x03\x04") + 6] |= 1
    changed[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (archive({"big": bytes(2000)}), "is too large unpacked"),
        (understated(archive({"big": b"x" * 2000}), 10), "is not a complete zip file"),
        (b"PK\x03\x04 cut off", "is not a complete zip file"),
        (encrypted(archive({"a.jpg": b"x"})), "is not a complete zip file .*encrypted"),
        (archive({"a": b"x", "a/below": b"x"}), "is not a complete zip file .*Not a directory"),
        (archive({"a" * 300: b"x"}), "is not a complete zip file .*name too long"),
        (archive({"named": b"x"}).replace(b"named", b"\0amed"), "is not a complete zip file"),
    ],
)
def test_a_large_or_damaged_archive_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        unpacked(tmp_path, content)
    assert caught.value.path == tmp_path / "a.zip"
    assert sum(entry.stat().st_size for entry in (tmp_path / "target").rglob("*")) <= 1000


def test_an_archive_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comkd_cli.data.fetch.MOST_MEMBERS", 2)
    with pytest.raises(DataError, match="has too many members") as caught:
        unpacked(tmp_path, archive({"a": b"x", "b": b"x", "c": b"x"}))
    assert (caught.value.found, caught.value.allowed) == (3, "2 at most")


def test_a_disk_without_room_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2))
    with pytest.raises(WriteError, match="3 bytes are needed and 2 are free") as caught:
        unpacked(tmp_path, archive({"a": b"xyz"}))
    assert caught.value.path == tmp_path
    assert not any((tmp_path / "target").iterdir())


def test_a_disk_that_fills_while_unpacking_is_no_damaged_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        unpacked(tmp_path, archive({"a": b"xyz"}))
    assert caught.value.path == tmp_path / "target"


def test_what_a_system_left_in_an_archive_is_not_unpacked(tmp_path: Path) -> None:
    junk = ("__MACOSX/set/a.jpg", "set/__MACOSX/a.jpg", "set/.DS_Store", "set/cat/Thumbs.db", "set/cat/._a.jpg")
    assert unpacked(tmp_path, archive({"set/cat/a.jpg": b"x", **dict.fromkeys(junk, b"x")})) == ["set/cat/a.jpg"]


def test_ten_data_sets_have_an_archive() -> None:
    assert len([dataset for dataset in CATALOG.values() if dataset.archive]) == 10
