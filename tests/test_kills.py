"""The kill harness: what it plans, what it compares, that it finds what is wrong, and a slice of its cases."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.kills import harness
from benchmarks.kills.harness import Case, Harness, planned
from benchmarks.kills.kinds import KINDS
from benchmarks.kills.processes import Kill
from benchmarks.kills.states import differences, state_of

FOLDERS = ("work", "hub", "temporary")


def test_a_case_follows_from_its_seed_and_number_alone() -> None:
    kinds = list(KINDS)
    assert planned(1, 7, kinds) == planned(1, 7, kinds)
    first = [planned(1, number, kinds) for number in range(400)]
    assert first != [planned(2, number, kinds) for number in range(400)]
    assert {case.kind for case in first} == set(kinds)
    kills = [kill for case in first for kill in case.kills]
    assert {kill.mode for kill in kills} == {"instant", "before", "during"}
    assert all(0 <= kill.fraction < 1 for kill in kills)
    assert {len(case.kills) for case in first} == {1, 2, 3, 4}


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a command may leave."""
    for name, content in {
        "work/student.pt": "weights",
        "work/metrics.jsonl": '{"epoch": 1, "loss": 0.5, "images_per_second": 100.0}\n',
        "work/cache/cost.json": '{"seconds": 1.5, "crops": 3}\n',
        "hub/blobs/abc": "archive",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "work/empty").mkdir()
    (tmp_path / "hub/link").symlink_to("blobs/abc")
    (tmp_path / "temporary").mkdir()
    with closing(sqlite3.connect(tmp_path / "work/image_digests.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE files (path BLOB PRIMARY KEY, digest BLOB)")
        connection.execute("INSERT INTO files VALUES ('a.png', 'digest')")
    return tmp_path


def _insert_row(root: Path) -> None:
    with closing(sqlite3.connect(root / "work/image_digests.sqlite")) as connection, connection:
        connection.execute("UPDATE files SET digest = 'other'")


def _relink(root: Path) -> None:
    (root / "hub/link").unlink()
    (root / "hub/link").symlink_to("blobs/other")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda root: (root / "work/student.pt").write_text("Weights"), "differs: work/student.pt"),
        (lambda root: (root / "work/student.pt").chmod(0o600), "differs: work/student.pt"),
        (lambda root: (root / "work/student.pt").unlink(), "missing: work/student.pt"),
        (lambda root: (root / "work/.a.pt.abcdefgh.tmp").touch(), "left behind: work/.a.pt.abcdefgh.tmp"),
        (lambda root: (root / "work/empty").rmdir(), "missing: work/empty"),
        (lambda root: (root / "temporary/x").mkdir(), "left behind: temporary/x"),
        (lambda root: (root / "hub/blobs/abc.1.incomplete").touch(), "left behind: hub/blobs/abc.1.incomplete"),
        (_relink, "differs: hub/link"),
        (_insert_row, "differs: work/image_digests.sqlite"),
        (
            lambda root: (root / "work/metrics.jsonl").write_text(
                '{"epoch": 1, "loss": 0.25, "images_per_second": 100.0}'
            ),
            "differs: work/metrics.jsonl",
        ),
    ],
)
def test_every_difference_of_two_folders_is_named(left: Path, change: Callable[[Path], object], line: str) -> None:
    before = state_of(left, FOLDERS)
    assert differences(before, state_of(left, FOLDERS)) == []
    change(left)
    assert differences(state_of(left, FOLDERS), before) == [line]


def test_times_and_what_other_programs_leave_are_no_differences(left: Path) -> None:
    before = state_of(left, FOLDERS)
    (left / "work/metrics.jsonl").write_text('{"epoch": 1, "loss": 0.5, "images_per_second": 7.5}\n')
    (left / "work/cache/cost.json").write_text('{"seconds": 2.5, "crops": 9}\n')
    (left / "temporary/.ses").touch()
    (left / "hub/tmp5162f42c").mkdir()
    assert differences(state_of(left, FOLDERS), before) == []
    (left / "work/cache/cost.json").write_text('{"seconds": 2.5, "cr')
    with pytest.raises(ValueError, match="Unterminated"):
        state_of(left, FOLDERS)


def test_an_index_without_its_table_yet_is_another_state(left: Path) -> None:
    before = state_of(left, FOLDERS)
    (left / "work/image_digests.sqlite").unlink()
    sqlite3.connect(left / "work/image_digests.sqlite").close()
    (left / "work/image_digests.sqlite").touch()
    assert differences(state_of(left, FOLDERS), before) == ["differs: work/image_digests.sqlite"]


def leave_a_file() -> None:
    """Let a report be a program that leaves its temporary file."""
    from comkd_cli import files

    files._remove_unfinished = lambda path: None


def leave_a_process() -> None:
    """Let it start a process that outlives it."""
    import subprocess

    subprocess.Popen(["sleep", "30"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("kills").resolve(), "http://127.0.0.1:9")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (None, None),
        (leave_a_file, "left behind: work/tiny/few/seed1/.report.html."),
        (leave_a_process, "processes left: sleep 30"),
    ],
)
def test_it_finds_a_file_and_a_process_that_are_left(
    prepared: Harness, monkeypatch: pytest.MonkeyPatch, broken: Callable[[], None] | None, found: str | None
) -> None:
    monkeypatch.setitem(KINDS, "report", replace(KINDS["report"], before=broken))
    monkeypatch.setattr("benchmarks.kills.processes.ORPHAN_SECONDS", 1.0)
    monkeypatch.setattr(prepared, "tally", harness.Tally())
    operations = prepared.operations("report")
    number = next(i for i, line in enumerate(operations) if line.startswith("fsync") and "report.html" in line)
    kill = Kill("before", (number + 0.5) / len(operations), 0.0)
    prepared.run(Case(0, "report", (kill,)), seed=1)
    assert prepared.tally.kills == {"report": 1}
    assert prepared.tally.phases == {"report": {"fsync report.html (temporary)": 1}}
    if found is None:
        assert prepared.tally.findings == []
    else:
        (finding,) = prepared.tally.findings
        assert finding["found"].startswith(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_find_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["distill", "evaluate", "export", "predict", "fetch", "report"]
    code = harness.main(["--kills", "20", "--seed", "1", "--kinds", *kinds])
    document = json.loads(capsys.readouterr().out)
    assert document["findings"] == []
    assert code == 0
    assert document["kills"] == sum(document["kills_by_kind"].values()) == sum(document["kills_by_mode"].values()) >= 20
