import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli import files
from comkd_cli.errors import ComkdError, WriteError
from comkd_cli.files import (
    atomic_folder,
    atomic_write,
    check_writable,
    is_newer_format,
    remove_folder,
    sha256_of_data,
    sha256_of_file,
    temporary_folder,
    write_text,
)

KILLED_WHILE_WRITING_A_FILE = """
import os, signal, sys
from pathlib import Path
from comkd_cli.files import atomic_write
with atomic_write(Path(sys.argv[1])) as unfinished:
    unfinished.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_WHILE_WRITING_A_FOLDER = """
import os, signal, sys
from pathlib import Path
from comkd_cli.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as unfinished:
    (unfinished / "file").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_while_writing(block: AbstractContextManager[Path], error: BaseException, name: str = "") -> None:
    with block as unfinished:
        (unfinished / name).write_bytes(b"half")
        raise error


def run_and_die(script: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


# --- files ---------------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_until_the_block_ends_and_the_new_one_then(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(b"new, and longer")
        assert path.read_bytes() == b"old"
        assert unfinished.parent == path.parent  # a rename is whole within one file system only
    assert path.read_bytes() == b"new, and longer"
    assert listing(tmp_path) == ["file.bin"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="no space"):
        fail_while_writing(atomic_write(path), RuntimeError("no space"))
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file.bin"]


def test_a_block_that_fails_makes_no_file_where_none_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(atomic_write(tmp_path / "file.bin"), KeyboardInterrupt())
    assert listing(tmp_path) == []


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    run_and_die(KILLED_WHILE_WRITING_A_FILE, path)
    assert path.read_bytes() == b"old"
    assert [name for name in listing(tmp_path) if not name.startswith(".")] == ["file.bin"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_what_a_process_killed_while_writing_a_file_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    run_and_die(KILLED_WHILE_WRITING_A_FILE, path)
    run_and_die(KILLED_WHILE_WRITING_A_FILE, path)
    assert len(listing(tmp_path)) == 1
    write_text(tmp_path / "other.bin", "x")  # which removes nothing of file.bin
    assert len(listing(tmp_path)) == 2
    write_text(path, "new")
    assert listing(tmp_path) == ["file.bin", "other.bin"]


def test_files_that_only_look_like_leftovers_stay(tmp_path: Path) -> None:
    names = [".file.bin.original", ".file.bin.tmp", ".file.bin.toolong123.tmp", "file.bin.abcdefgh.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"precious")
    (tmp_path / ".file.bin.abcdefgh.tmp").mkdir()
    (tmp_path / ".file.bin.linkedto.tmp").symlink_to(tmp_path / "file.bin.abcdefgh.tmp")
    before = listing(tmp_path)
    write_text(tmp_path / "file.bin", "new")
    assert listing(tmp_path) == sorted([*before, "file.bin"])


def test_a_file_that_another_process_is_writing_stays(tmp_path: Path) -> None:
    code = WRITES_AND_WAITS.replace("atomic_folder", "atomic_write").replace('(unfinished / "file")', "unfinished")
    command = [sys.executable, "-c", code, str(tmp_path / "file.bin")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        write_text(tmp_path / "file.bin", "new")
        assert (tmp_path / "file.bin").read_text() == "new"
        other.communicate("")
    assert other.returncode == 0
    assert (tmp_path / "file.bin").read_bytes() == b"of the other process"
    assert listing(tmp_path) == ["file.bin"]


def test_a_process_killed_while_writing_makes_no_file_where_none_was(tmp_path: Path) -> None:
    run_and_die(KILLED_WHILE_WRITING_A_FILE, tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_may_be_read_by_whom_any_new_file_may(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("x")
        write_text(tmp_path / "whole", "x")
        assert os.umask(umask) == umask  # and the mask is left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a/b/c.txt", "text")
    assert (tmp_path / "a/b/c.txt").read_text() == "text"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_written_as_utf8(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.txt"
    write_text(path, text)
    assert path.read_bytes() == text.encode("utf-8")


# --- folders -------------------------------------------------------------------------------------------


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")
    (folder / "only old").write_bytes(b"")
    return folder


def test_a_folder_takes_the_place_of_the_old_one_whole(old_folder: Path) -> None:
    with atomic_folder(old_folder) as unfinished:
        (unfinished / "file").write_bytes(b"new")
        assert (old_folder / "file").read_bytes() == b"old"
    assert listing(old_folder) == ["file"]
    assert (old_folder / "file").read_bytes() == b"new"
    assert listing(old_folder.parent) == ["bundle"]


def test_a_folder_is_made_where_none_was_with_the_folders_above_it(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a/b") as unfinished:
        (unfinished / "file").write_bytes(b"new")
    assert (tmp_path / "a/b/file").read_bytes() == b"new"


def test_a_block_that_fails_leaves_the_old_folder_and_nothing_else(old_folder: Path) -> None:
    with pytest.raises(RuntimeError, match="parity"):
        fail_while_writing(atomic_folder(old_folder), RuntimeError("parity"), "file")
    assert (old_folder / "file").read_bytes() == b"old"
    assert listing(old_folder) == ["file", "only old"]
    assert listing(old_folder.parent) == ["bundle"]


def test_a_process_killed_while_writing_leaves_the_old_folder(old_folder: Path) -> None:
    run_and_die(KILLED_WHILE_WRITING_A_FOLDER, old_folder)
    assert (old_folder / "file").read_bytes() == b"old"
    assert listing(old_folder) == ["file", "only old"]
    assert [name for name in listing(old_folder.parent) if not name.startswith(".")] == ["bundle"]


def test_what_a_killed_process_left_is_removed_by_the_next_one(old_folder: Path) -> None:
    run_and_die(KILLED_WHILE_WRITING_A_FOLDER, old_folder)
    run_and_die(KILLED_WHILE_WRITING_A_FOLDER, old_folder)  # which removes what the first one left
    assert len(listing(old_folder.parent)) == 2
    with atomic_folder(old_folder) as unfinished:
        (unfinished / "file").write_bytes(b"new")
    assert listing(old_folder.parent) == ["bundle"]


WRITES_AND_WAITS = """
import sys
from pathlib import Path
from comkd_cli.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as unfinished:
    (unfinished / "file").write_bytes(b"of the other process")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_is_writing_stays(old_folder: Path) -> None:
    command = [sys.executable, "-c", WRITES_AND_WAITS, str(old_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        with atomic_folder(old_folder) as unfinished:
            (unfinished / "file").write_bytes(b"new")
        assert (old_folder / "file").read_bytes() == b"new"
        other.communicate("")
    assert other.returncode == 0
    assert (old_folder / "file").read_bytes() == b"of the other process"
    assert listing(old_folder.parent) == ["bundle"]


def test_folders_that_only_look_like_leftovers_stay(old_folder: Path) -> None:
    for name in (".bundle.mine", ".bundle.12345678", ".bundle2.abcdefgh"):
        (old_folder.parent / name).mkdir()
        (old_folder.parent / name / "precious").write_bytes(b"x")
    before = listing(old_folder.parent)
    with atomic_folder(old_folder):
        pass
    assert listing(old_folder.parent) == before


def test_a_temporary_folder_goes_with_its_block_and_after_a_kill_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / ".comkd.abcdefgh/new"
    left.mkdir(parents=True)
    (left / "config.json").touch()
    with temporary_folder() as folder:
        assert listing(folder) == []
        (folder / "file").touch()
        with temporary_folder() as other:
            assert other != folder
        assert listing(folder) == ["file"]
        assert listing(tmp_path) == [folder.parent.name]
    assert listing(tmp_path) == []


def test_who_holds_the_lock_of_the_folder_above_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_SECONDS_OF_A_TURN", 0.05)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        write_text(tmp_path / "file", "x")
    finally:
        os.close(handle)
    assert listing(tmp_path) == ["file"]


def test_an_empty_leftover_is_removed_too(old_folder: Path) -> None:
    (old_folder.parent / ".bundle.aaaaaaaa").mkdir()  # of a process that was killed before it locked the folder
    with atomic_folder(old_folder):
        pass
    assert listing(old_folder.parent) == ["bundle"]


def test_a_folder_that_a_killed_process_had_moved_aside_comes_back(old_folder: Path) -> None:
    scratch = old_folder.parent / ".bundle.abcdefgh"
    (scratch / "new").mkdir(parents=True)
    old_folder.replace(scratch / "old")
    with pytest.raises(RuntimeError, match="parity"):
        fail_while_writing(atomic_folder(old_folder), RuntimeError("parity"), "file")
    assert listing(old_folder) == ["file", "only old"]
    assert listing(old_folder.parent) == ["bundle"]


def test_an_interruption_between_the_two_moves_brings_the_old_folder_back(
    old_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(old_folder):
        pass
    assert listing(old_folder) == ["file", "only old"]
    assert listing(old_folder.parent) == ["bundle"]


def test_a_link_leads_to_the_folder_that_is_replaced(old_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old_folder)
    with atomic_folder(tmp_path / "link") as unfinished:
        (unfinished / "file").write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (old_folder / "file").read_bytes() == b"new"


def test_the_current_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_folder(Path()) as unfinished:
        (unfinished / "file").write_bytes(b"new")
    assert listing(tmp_path / "here") == ["file"]
    assert listing(tmp_path) == ["here"]


# --- what the system refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [atomic_write, atomic_folder])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "No space left on device; free space there"),
        (errno.EFBIG, "File too large; raise the limit on the size of files"),
        (errno.EIO, "Input/output error; check the disk"),
    ],
)
def test_a_full_disk_is_one_message_with_the_path_and_the_remedy(
    tmp_path: Path, whole: Callable[[Path], AbstractContextManager[Path]], number: int, reason: str
) -> None:
    with pytest.raises(WriteError) as caught, whole(tmp_path / "target"):
        raise OSError(number, os.strerror(number))  # as a write to an open file does, without a name
    assert str(caught.value).startswith(f"{tmp_path}/target: could not be written: {reason}")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("whole", [atomic_write, atomic_folder])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "not read-only"), (errno.EACCES, "you may write to"), (errno.EPERM, "you may write to")],
)
def test_a_place_that_may_not_be_written_is_one_message_before_the_block_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[Path], AbstractContextManager[Path]],
    number: int,
    remedy: str,
) -> None:
    def refused(path: object, *_: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "mkdir", refused)  # root may write wherever the mode forbids it
    with (
        pytest.raises(WriteError, match=rf"^{tmp_path}/deep/target: could not be written: .*{remedy}"),
        whole(tmp_path / "deep/target"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("whole", [atomic_write, atomic_folder])
def test_a_file_in_the_place_of_a_folder_above_is_said(
    tmp_path: Path, whole: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with (
        pytest.raises(WriteError, match=r"file/deep/target: could not be written: .* is a file"),
        whole(tmp_path / "file/deep/target"),
    ):
        pytest.fail("the block must not run")


LIMITED = """
import resource, signal, sys
from pathlib import Path
from comkd_cli.errors import WriteError
from comkd_cli.files import atomic_folder, write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda path: write_text(path, "x" * 9999), None):
    try:
        if write:
            write(Path(sys.argv[1], "file"))
        else:
            with atomic_folder(Path(sys.argv[1], "bundle")) as folder:
                (folder / "graph").write_bytes(b"x" * 9999)
    except WriteError as error:
        print(error)
"""


def test_a_real_limit_on_the_size_of_files_leaves_the_old_ones(old_folder: Path) -> None:
    (old_folder.parent / "file").write_bytes(b"old")
    command = [sys.executable, "-c", LIMITED, str(old_folder.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    of_file, of_folder = done.stdout.splitlines()
    assert of_file.startswith(f"{old_folder.parent}/file: could not be written: File too large")
    assert of_folder.startswith(f"{old_folder}: could not be written: File too large")
    assert listing(old_folder.parent) == ["bundle", "file"]
    assert listing(old_folder) == ["file", "only old"]


def test_an_error_of_another_file_is_not_said_to_be_the_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "bundle"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(PermissionError) as caught, atomic_folder(tmp_path / "bundle"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "weights.pt"))
    assert caught.value.filename == str(tmp_path / "weights.pt")
    assert listing(tmp_path) == []


def test_a_mount_point_is_refused_before_the_block_runs() -> None:
    with pytest.raises(WriteError, match="a mount point cannot be replaced"), atomic_folder(Path("/proc")):
        pytest.fail("the block must not run")


def test_removing_a_folder_takes_all_that_is_in_it_and_minds_none_that_is_not_there(old_folder: Path) -> None:
    (old_folder / "deep/er").mkdir(parents=True)
    remove_folder(old_folder)
    assert not old_folder.exists()
    remove_folder(old_folder)


# --- fingerprints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 7])
def test_the_sha256_of_a_file_is_that_of_its_content(tmp_path: Path, size: int) -> None:
    content = bytes(i * i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(), JSON, min_size=2), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_count(data: dict[str, object], dice: object) -> None:
    keys = list(data)
    dice.shuffle(keys)  # type: ignore[attr-defined]
    assert sha256_of_data({key: data[key] for key in keys}) == sha256_of_data(data)


@given(JSON, JSON)
def test_data_have_the_same_sha256_exactly_when_they_are_the_same_json(first: object, second: object) -> None:
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (sha256_of_data(first) == sha256_of_data(second)) is same


def test_the_sha256_of_data_is_a_fixed_number() -> None:
    # From `printf '{"a":[1,"é"],"b":null}' | sha256sum`.
    assert sha256_of_data({"b": None, "a": [1, "é"]}) == (
        "1e02bc81a26af2f027329541e97eef36f3290bedc6dfe043dbe66b057ecb13ba"
    )


def test_names_that_are_not_utf8_have_a_sha256_of_their_own() -> None:
    first, second = (sha256_of_data([os.fsdecode(name)]) for name in (b"\xe9.png", b"\xe8.png"))
    assert first != second


# --- before work begins --------------------------------------------------------------------------------


def test_a_folder_that_can_be_made_and_written_to_passes_and_is_not_made(tmp_path: Path) -> None:
    check_writable(tmp_path, "remedy")
    check_writable(tmp_path / "a/b/c", "remedy")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_the_folder_and_the_remedy_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/runs", Path("/proc/runs")):
        with pytest.raises(ComkdError, match=f"^{folder}: could not be written: .*; give another one"):
            check_writable(folder, "give another one")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(ComkdError, match="Permission denied"):
        check_writable(tmp_path / "closed/runs", "")


@pytest.mark.parametrize(
    ("found", "newer"),
    [("kind/2", True), ("kind/10", True), ("kind/1", False), ("kind/0", False), ("other/2", False), ("kind", False),
     ("kind/2b", False), ("kind/²", False), (None, False), (2, False), ("kind/" + "9" * 5000, False)],
)  # fmt: skip
def test_a_later_version_of_the_same_format_is_newer(found: object, newer: bool) -> None:
    assert is_newer_format(found, "kind/1") is newer
