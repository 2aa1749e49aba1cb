import hashlib
import os
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from comkd_cli.data import contents
from comkd_cli.data.contents import FileContents
from comkd_cli.events import Event, Progress

KEYS = ("a.png", "sub/b.png", "c.png")
OLD = 1_600_000_000  # a modification time long ago, in seconds


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for key in KEYS:
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {key}".encode())
    return tmp_path / "images"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that remembers files however recently they changed."""
    monkeypatch.setattr(contents, "SETTLED_AFTER_SECONDS", -3600.0)
    return tmp_path / "runs/digests.sqlite"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, from now on."""
    names: list[str] = []
    digest = contents._digest_of_file

    def counted(path: str, state: contents.State | str) -> bytes:
        names.append(Path(path).name)
        return digest(path, state)

    monkeypatch.setattr(contents, "_digest_of_file", counted)
    return names


def found(root: Path, index: Path | None = None, keys: tuple[str, ...] = KEYS) -> list[bytes]:
    return list(FileContents(root, index=index).digests(keys))


def test_a_digest_is_the_sha256_of_the_file(root: Path, index: Path) -> None:
    expected = [hashlib.sha256((root / key).read_bytes()).digest() for key in KEYS]
    assert found(root) == expected
    assert found(root, index) == expected  # read
    assert found(root, index) == expected  # remembered
    assert found(root, index, KEYS[::-1]) == expected[::-1]


def test_a_file_is_read_once(root: Path, index: Path, read: list[str]) -> None:
    found(root, index)
    assert sorted(read) == ["a.png", "b.png", "c.png"]
    found(root, index)
    assert len(read) == 3
    (root / "d.png").write_bytes(b"new")
    found(root, index, (*KEYS, "d.png"))
    assert read[3:] == ["d.png"]


def test_without_an_index_nothing_is_remembered(root: Path, read: list[str]) -> None:
    found(root)
    found(root)
    assert len(read) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"CONTENT of a.png"),
        lambda path: (path.write_bytes(b"CONTENT of a.png"), os.utime(path, (OLD, OLD))),
        lambda path: (path.rename(path.with_suffix(".old")), path.write_bytes(b"CONTENT of a.png")),
        lambda path: (path.unlink(), path.symlink_to(path.parent / "c.png")),
    ],
    ids=["in place", "with its modification time set back", "by another file", "by a link"],
)
def test_a_file_of_the_same_size_that_was_replaced_is_noticed(
    root: Path, index: Path, change: Callable[[Path], object]
) -> None:
    os.utime(root / "a.png", (OLD, OLD))
    before = found(root, index)
    change(root / "a.png")
    after = found(root, index)
    assert after == [hashlib.sha256((root / key).read_bytes()).digest() for key in KEYS]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_the_contents_of_a_moved_folder_are_the_same(root: Path, index: Path) -> None:
    before = found(root, index)
    moved = root.rename(root.parent / "elsewhere")
    assert found(moved, index) == before
    assert found(Path(shutil.copytree(moved, root.parent / "copy")), index) == before


def test_a_file_that_just_changed_is_not_remembered(
    root: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again without its time showing it, on a file system that keeps times in steps."""
    index = tmp_path / "digests.sqlite"
    monkeypatch.setattr(contents, "SETTLED_AFTER_SECONDS", 3600.0)
    found(root, index)
    found(root, index)
    assert len(read) == 6


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    root: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = contents._digest_of_file

    def then_changed(path: str, state: contents.State | str) -> bytes:
        try:
            return digest(path, state)
        finally:
            Path(path).write_bytes(b"changed meanwhile")

    with monkeypatch.context() as patch:
        patch.setattr(contents, "_digest_of_file", then_changed)
        found(root, index)
    assert found(root, index) == [hashlib.sha256(b"changed meanwhile").digest()] * 3


def test_a_missing_file_differs_from_an_empty_one_and_is_noticed_when_it_appears(root: Path, index: Path) -> None:
    keys = (*KEYS, "gone.png")
    before = found(root, index, keys)
    (root / "gone.png").write_bytes(b"")
    after = found(root, index, keys)
    assert after[3] == hashlib.sha256(b"").digest() != before[3]


def test_names_that_are_not_utf8_are_remembered(root: Path, index: Path, read: list[str]) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (root / name).write_bytes(b"coffee")
    assert found(root, index, (name,)) == found(root, index, (name,)) == [hashlib.sha256(b"coffee").digest()]
    assert len(read) == 1


@pytest.mark.parametrize("content", [b"no database" * 100, b""], ids=["damaged", "empty"])
def test_a_damaged_index_costs_a_reading_and_is_replaced(
    root: Path, index: Path, read: list[str], content: bytes
) -> None:
    index.parent.mkdir()
    index.write_bytes(content)
    expected = found(root)
    for _ in range(2):
        assert found(root, index) == expected
    assert len(read) == 6  # without the index, and the first time with it


def test_a_locked_index_costs_a_reading(root: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = found(root, index)
    monkeypatch.setattr(contents, "LOCK_TIMEOUT_SECONDS", 0.01)
    with closing(sqlite3.connect(index)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert found(root, index) == expected


def test_an_index_that_cannot_be_written_costs_a_reading(root: Path, index: Path) -> None:
    index.parent.parent.joinpath("runs").write_text("a file where the folder would be")
    assert found(root, index) == found(root)


def test_by_size_and_time_no_file_is_read(root: Path, index: Path, read: list[str]) -> None:
    for key in KEYS:
        os.utime(root / key, (OLD, OLD))
    by_time = FileContents(root, "size_and_time", index)
    before = list(by_time.digests(KEYS))
    copy = Path(shutil.copytree(root, root.parent / "copy"))  # which keeps modification times
    assert list(FileContents(copy, "size_and_time").digests(KEYS)) == before
    os.utime(root / "a.png", (OLD + 1, OLD + 1))
    after = list(by_time.digests(KEYS))
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]
    assert not read
    assert not index.exists()


def test_progress_is_reported_and_the_report_is_not_pickled(root: Path) -> None:
    events: list[Event] = []
    told = FileContents(root, report=events.append)
    list(told.digests(KEYS))
    assert isinstance(events[-1], Progress)
    assert (events[-1].done, events[-1].total) == (3, 3)
    assert pickle.loads(pickle.dumps(told)).report is None


def test_many_files_are_looked_up_in_parts(
    tmp_path: Path, index: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "FILES_AT_ONCE", 70)
    monkeypatch.setattr(contents, "FILES_PER_QUERY", 32)
    keys = tuple(f"{number}.png" for number in range(200))
    for key in keys:
        (tmp_path / key).write_text(key)
    expected = [hashlib.sha256(key.encode()).digest() for key in keys]
    assert found(tmp_path, index, keys) == expected
    assert found(tmp_path, index, keys) == expected
    assert len(read) == 200
