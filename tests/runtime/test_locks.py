import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from comkd_cli.errors import InUseError, WriteError
from comkd_cli.events import Event, Notice
from comkd_cli.runtime import locks
from comkd_cli.runtime.locks import Holder, has_lock_files, if_free, in_turn_with_others, sole_writer
from tests import warm


def _hold(target: Path, pipe: Connection, forks: bool) -> None:
    with sole_writer(target):
        if forks and (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        pipe.send(child if forks else None)
        pipe.recv()


class Other:
    """Another process that holds the lock of a target until it is told to leave or is killed."""

    def __init__(self, target: Path, forks: bool = False) -> None:
        self.pipe, theirs = warm.context().Pipe()
        self.process = warm.context().Process(target=_hold, args=(target, theirs, forks))
        self.process.start()
        theirs.close()
        self.child: int | None = self.pipe.recv()

    def leave(self) -> None:
        self.pipe.send("leave")
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_second_writer_is_refused_with_the_holder_and_nothing_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "run"
    before = time.strftime("%Y-%m-%d %H:%M:%S")
    other = Other(target)
    with pytest.raises(InUseError) as caught, sole_writer(target):
        pass
    holder = caught.value.found
    assert isinstance(holder, Holder)
    assert (holder.pid, holder.host) == (other.process.pid, socket.gethostname())
    assert before <= holder.since <= time.strftime("%Y-%m-%d %H:%M:%S")
    assert caught.value.path == target
    other.leave()
    with sole_writer(target):
        assert names(target.parent) == {".run.lock", ".run.holder"}
    assert names(target.parent) == set()


def test_the_lock_of_a_killed_process_is_taken_over_also_while_its_workers_live(tmp_path: Path) -> None:
    other = Other(tmp_path / "run", forks=True)
    assert other.child is not None
    other.kill()
    try:
        os.kill(other.child, 0)  # it lives
        assert names(tmp_path) == {".run.lock", ".run.holder"}
        with sole_writer(tmp_path / "run"):
            held = Holder.read(tmp_path / ".run.holder")
            assert held is not None
            assert held.pid == os.getpid()
    finally:
        os.kill(other.child, signal.SIGKILL)
    assert names(tmp_path) == set()


def test_another_process_is_waited_for_and_named_once(tmp_path: Path) -> None:
    other = Other(tmp_path / "teacher")
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        other.leave()

    with in_turn_with_others(tmp_path / "teacher", report):
        assert not other.process.is_alive()
    (notice,) = events
    assert isinstance(notice, Notice)
    assert f"pid {other.process.pid} on {socket.gethostname()}" in notice.text


def test_a_link_and_its_folder_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    other = Other(tmp_path / "run")
    with pytest.raises(InUseError), sole_writer(tmp_path / "link"):
        pass
    other.leave()


def test_targets_do_not_exclude_one_another_and_an_error_releases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="within"), sole_writer(tmp_path / "a"), sole_writer(tmp_path / "b"):
        raise ValueError("within")
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError) as caught, sole_writer(tmp_path / "file" / "run"):
        pass
    assert caught.value.path == tmp_path / "file" / "run"


def _count(folder: Path, times: int) -> None:
    locks.POLL_SECONDS = 0.001
    for _ in range(times):
        with in_turn_with_others(folder / "count"):
            before = int((folder / "count").read_text())
            time.sleep(0.001)  # another process would read the same number
            (folder / "count").write_text(str(before + 1))


@pytest.mark.slow
def test_blocks_of_many_processes_never_overlap_though_the_lock_is_removed_each_time(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    processes = [warm.context().Process(target=_count, args=(tmp_path, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "200"


def test_what_a_killed_holder_left_is_seen_and_removed_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "run"
    assert not has_lock_files(target)
    other = Other(target)
    assert has_lock_files(target)
    with if_free(target) as free:
        assert not free
    assert names(tmp_path) == {".run.lock", ".run.holder"}
    other.kill()
    assert has_lock_files(target)
    with if_free(target) as free:
        assert free
    assert names(tmp_path) == set()
