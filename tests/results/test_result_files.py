import json
from dataclasses import replace
from pathlib import Path

import pytest

from comkd_cli.events import Event, Notice
from comkd_cli.results import result_files
from comkd_cli.results.records import Missing, Record, Results, from_json
from comkd_cli.results.result_files import ResultFiles, add_results, forget_model
from tests import warm

RECORD = Record("m/student.pt", "student", "digits", 97.5, 97.25, 360, 1234)
FILES = {"results.json", "results.csv", "results.md", "results.tex"}


def ignore(_event: Event) -> None:
    pass


def read(folder: Path) -> Results:
    return from_json((folder / "results.json").read_text(encoding="utf-8"))


def test_each_evaluation_adds_to_all_four_files(tmp_path: Path) -> None:
    folder = tmp_path / "new/runs"
    add_results(folder, Results([RECORD], [Missing("dtd", "not there")]), ignore)
    pets = replace(RECORD, dataset="pets", top1_percent=50.0)
    everything = add_results(folder, Results([pets]), ignore)
    assert list(everything.records) == list(read(folder).records) == [RECORD, pets]
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == FILES
    for name in FILES:
        text = (folder / name).read_text()
        assert "pets" in text
        assert "digits" in text
    assert "dtd: not there" in (folder / "results.md").read_text()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"accuracy": 3}', b"[" * 100_000, b'{"records": [{"model": 1}]}'],
    ids=["empty", "cut", "no text", "foreign", "deep", "odd record"],
)
def test_a_file_that_is_no_results_is_moved_aside_and_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    (tmp_path / "results.json.bak").write_bytes(b"an older one")
    said: list[Event] = []
    add_results(tmp_path, Results([RECORD]), said.append)
    assert list(read(tmp_path).records) == [RECORD]
    assert (tmp_path / "results.json.bak").read_bytes() == b"an older one"
    assert (tmp_path / "results.json.bak2").read_bytes() == content
    (notice,) = said
    assert isinstance(notice, Notice)
    assert "results.json.bak2" in notice.text


def test_a_folder_of_that_name_is_moved_aside_too(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    add_results(tmp_path, Results([RECORD]), ignore)
    assert list(read(tmp_path).records) == [RECORD]
    assert (tmp_path / "results.json.bak").is_dir()


def add_many(folder: Path, name: str) -> None:
    for number in range(12):
        add_results(folder, Results([replace(RECORD, model=name, seed=number)]), ignore)


@pytest.mark.slow
def test_evaluations_at_the_same_time_lose_no_record(tmp_path: Path) -> None:
    writers = [warm.context().Process(target=add_many, args=(tmp_path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = {(record.model, record.seed) for record in read(tmp_path).records}
    assert found == {(name, number) for name in "abc" for number in range(12)}


def test_a_lock_that_is_held_for_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_files, "LOCK_SECONDS", 0.1)
    files = ResultFiles(tmp_path, ignore)
    with result_files._locked(tmp_path):
        files.add(Results([RECORD]))
    assert files.problem is not None
    assert files.problem.path == str(tmp_path / ".results.json.lock")
    assert not (tmp_path / "results.json").exists()


def test_without_locks_records_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_more: object) -> None:
        raise NotImplementedError("no locks on this file system")

    monkeypatch.setattr(result_files.FileLock, "acquire", refuse)
    add_results(tmp_path, Results([RECORD]), ignore)
    assert list(read(tmp_path).records) == [RECORD]


def test_what_could_not_be_written_is_written_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.write_text("a file in its place")
    files = ResultFiles(folder, ignore)
    files.add(Results([RECORD]))
    assert files.problem is not None
    assert str(files.problem.path) == str(folder)
    folder.unlink()
    files.add(Results([replace(RECORD, dataset="pets")]))
    assert files.problem is None
    assert files.records_in_all == len(read(folder).records) == 2


def test_the_records_of_a_replaced_model_are_forgotten(tmp_path: Path) -> None:
    forget_model(tmp_path, "m/student.pt", ignore)  # nothing there yet
    other = replace(RECORD, model="n/student.pt")
    add_results(tmp_path, Results([RECORD, other, replace(RECORD, dataset="pets")]), ignore)
    forget_model(tmp_path, "m/student.pt", ignore)
    assert list(read(tmp_path).records) == [other]
    assert "m/student.pt" not in (tmp_path / "results.csv").read_text()


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_results(tmp_path, Results([RECORD]), ignore)
    before = (tmp_path / "results.json").read_bytes()

    def full(*_arguments: object, **_more: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    files = ResultFiles(tmp_path, ignore)
    files.add(Results([replace(RECORD, dataset="pets")]))
    assert files.problem is not None
    assert "No space left on device" in files.problem.problem
    assert str(files.problem.path).endswith("results.json")
    assert (tmp_path / "results.json").read_bytes() == before
    assert json.loads(before)["records"]


def test_records_of_other_images_under_one_name_are_replaced_with_a_notice(tmp_path: Path) -> None:
    said: list[Event] = []
    add_results(tmp_path, Results([replace(RECORD, images_sha256="a")]), said.append)
    add_results(tmp_path, Results([replace(RECORD, images_sha256="a", top1_percent=97.0)]), said.append)
    assert not said
    add_results(tmp_path, Results([replace(RECORD, images_sha256="b", top1_percent=10.0)]), said.append)
    assert [record.top1_percent for record in read(tmp_path).records] == [10.0]
    (notice,) = said
    assert isinstance(notice, Notice)
    assert "1 record" in notice.text
    assert "digits" in notice.text
    assert "--out" in notice.text


def test_what_failed_names_its_model_once(tmp_path: Path) -> None:
    nameless = Missing("pets", "data.folder: no such folder", "runs/a/student.pt", failed=True)
    named = Missing("pets", "runs/b/student.pt: is damaged", "runs/b/student.pt", failed=True)
    assert nameless.line == "runs/a/student.pt: data.folder: no such folder"
    assert named.line == "runs/b/student.pt: is damaged"
    add_results(tmp_path, Results([RECORD], [nameless, named]), ignore)
    text = (tmp_path / "results.md").read_text()
    assert "- pets: runs/a/student.pt: data.folder: no such folder\n- pets: runs/b/student.pt: is damaged\n" in text


def test_names_that_are_not_utf_8_are_written_as_escapes_and_replaced_by_the_next_score(tmp_path: Path) -> None:
    odd = replace(RECORD, model="m\udcff/student.pt")
    add_results(tmp_path, Results([odd], [Missing("dtd", "no such folder: \udcfe")]), ignore)
    add_results(tmp_path, Results([replace(odd, top1_percent=50.0)]), ignore)
    (record,) = read(tmp_path).records
    assert (record.model, record.top1_percent) == ("m\\udcff/student.pt", 50.0)
    assert "m\\udcff/student.pt" in (tmp_path / "results.csv").read_text(encoding="utf-8")
    forget_model(tmp_path, "m\udcff/student.pt", ignore)
    assert not read(tmp_path).records
