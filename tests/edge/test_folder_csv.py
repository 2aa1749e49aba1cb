"""Predictions of a folder as a CSV file: its cells, and that a killed run resumes to the same bytes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from comkd_cli.bundles.standalone import standalone_predictor
from comkd_cli.edge import classifier as command
from comkd_cli.edge import folder_csv
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.folder_csv import CsvJob, CsvProblem, CsvSummary, bundle_settings, write_folder_csv

WriteBundle = Callable[..., Path]
COLOURS = ("red", "green", "blue")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """70 pictures, so that there are two whole batches and a part; two of them cannot be read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(70):
        Image.new("RGB", (9, 8), COLOURS[i % 3]).save(folder / f"{i:03}.png")
    (folder / "010.png").write_bytes(b"no picture")
    whole = (folder / "040.png").read_bytes()
    (folder / "040.png").write_bytes(whole[: len(whole) // 2])
    return folder


def run(bundle: Path, folder: Path, table: Path, *, top: int = 2, fresh: bool = False, **changes: Any) -> CsvSummary:
    made_by = {**bundle_settings(bundle, None, ()), **changes}
    return write_folder_csv(Classifier(bundle), CsvJob(folder, table, top, made_by, fresh))


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_image_has_a_row_with_its_classes_or_its_error(colour_bundle: Path, photos: Path, tmp_path: Path) -> None:
    summary = run(colour_bundle, photos, tmp_path / "out.csv")
    assert (summary.images, summary.unreadable, summary.resumed) == (70, 2, 0)
    found = rows(tmp_path / "out.csv")
    assert list(found[0]) == ["path", "class", "probability", "class_2", "probability_2", "error"]
    assert [row["path"] for row in found] == [f"{i:03}.png" for i in range(70)]
    one_by_one = Classifier(colour_bundle)
    for i, row in enumerate(found):
        if i in (10, 40):
            assert row["error"]
            assert str(photos) not in row["error"]
            assert {row[name] for name in row if name not in ("path", "error")} == {""}
        else:
            first, second = one_by_one.predict(photos / row["path"], top=2)
            assert (row["class"], row["class_2"], row["error"]) == (first.class_name, second.class_name, "")
            assert abs(float(row["probability"]) - first.probability) < 1e-6
            assert row["class"] == COLOURS[i % 3]


def test_names_with_commas_quotes_line_breaks_and_other_scripts_read_back(
    write_bundle: WriteBundle, tmp_path: Path
) -> None:
    names = ['a "quoted", red', "'=green;", "blaues Æ 狐"]
    bundle, folder = write_bundle(tmp_path / "odd", names), tmp_path / "photos"
    folder.mkdir()
    files = ['a,"b".png', "c\nd.png", "e\rf.png", "狐.png", "'.png"]
    for i, name in enumerate(files):
        Image.new("RGB", (8, 8), COLOURS[i % 3]).save(folder / name)
    run(bundle, folder, tmp_path / "out.csv", top=3)
    assert {row["path"]: row["class"] for row in rows(tmp_path / "out.csv")} == {
        name: names[i % 3] for i, name in enumerate(files)
    }


def test_a_file_name_that_is_not_utf8_leaves_the_table_utf8(colour_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    except OSError:
        pytest.skip("the file system takes UTF-8 names alone")
    run(colour_bundle, folder, tmp_path / "out.csv")
    (row,) = rows(tmp_path / "out.csv")
    assert (row["path"], row["class"]) == ("caf\\udce9.png", "red")


def test_a_pipe_among_the_images_is_an_error_and_never_waited_for(
    colour_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    os.mkfifo(photos / "pipe.png")
    assert run(colour_bundle, photos, tmp_path / "out.csv").unreadable == 3
    assert rows(tmp_path / "out.csv")[-1]["error"] == "is not a regular file"


def limited(bundle: Path, **fields: Any) -> Path:
    """The bundle with a temperature of 2 and a threshold."""
    path = bundle / "manifest.json"
    threshold = {"score": "max_probability", "value": 0.9, "classes": {"green": 0.0}, **fields}
    manifest = {**json.loads(path.read_text()), "calibration": {"temperature": 2.0}, "threshold": threshold}
    path.write_text(json.dumps(manifest))
    return bundle


def test_a_bundle_with_a_threshold_has_a_column_for_it(colour_bundle: Path, photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 8), (128, 120, 118)).save(photos / "grey.png")  # of no colour
    limited(colour_bundle)
    run(colour_bundle, photos, tmp_path / "out.csv")
    found = rows(tmp_path / "out.csv")
    assert list(found[0])[-3:] == ["probability_2", "none_of_these", "error"]
    for row in found:
        below = "" if row["error"] else str(row["class"] != "green" and float(row["probability"]) < 0.9).lower()
        assert row["none_of_these"] == below
    assert {"true", "false", ""} == {row["none_of_these"] for row in found}


def test_without_the_threshold_the_column_is_empty_and_the_table_is_another(
    colour_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    limited(colour_bundle)
    run(colour_bundle, photos, tmp_path / "out.csv")
    job = CsvJob(photos, tmp_path / "out.csv", 2, bundle_settings(colour_bundle, None, (), threshold=False))
    with pytest.raises(CsvProblem) as caught:
        write_folder_csv(Classifier(colour_bundle, threshold=False), job)
    assert caught.value.found == "threshold"
    write_folder_csv(Classifier(colour_bundle, threshold=False), replace(job, fresh=True))
    assert {row["none_of_these"] for row in rows(tmp_path / "out.csv")} == {""}


def test_a_table_of_a_bundle_without_a_threshold_has_the_columns_and_the_state_of_older_versions(
    colour_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    run(colour_bundle, photos, tmp_path / "out.csv")
    header = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "path,class,probability,class_2,probability_2,error"
    made_of = json.loads((tmp_path / "out.csv.state.json").read_text())["made_of"]
    assert set(made_of) == {"bundle", "precision", "added classes", "classes of an image", "images"}


class _Stop(Exception):
    """Ends a run between two batches."""


def interrupted(bundle: Path, folder: Path, table: Path, after: int) -> None:
    def stop(done: int, total: int) -> None:
        if done >= after:
            raise _Stop

    job = CsvJob(folder, table, 2, bundle_settings(bundle, None, ()))
    with pytest.raises(_Stop):
        write_folder_csv(Classifier(bundle), job, stop)


@pytest.mark.parametrize("tail", [b"", b"050.png,red,0.9", b'"a quote that never ends\r\n'])
@pytest.mark.parametrize("after", [0, 32, 64])
def test_a_resumed_table_is_an_undisturbed_one_whatever_was_half_written(
    colour_bundle: Path, photos: Path, tmp_path: Path, after: int, tail: bytes
) -> None:
    whole, table = tmp_path / "whole.csv", tmp_path / "out.csv"
    run(colour_bundle, photos, whole)
    interrupted(colour_bundle, photos, table, after)
    with table.open("ab") as file:
        file.write(tail)
    summary = run(colour_bundle, photos, table)
    assert (summary.images, summary.unreadable, summary.resumed) == (70, 2, after)
    assert table.read_bytes() == whole.read_bytes()


def test_a_table_that_was_killed_before_its_header_is_resumed(
    colour_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, table = tmp_path / "whole.csv", tmp_path / "out.csv"
    run(colour_bundle, photos, whole)

    def killed(*_: object) -> None:
        raise _Stop

    for method in ("_write", "_save_state"):
        with monkeypatch.context() as patched:
            patched.setattr(folder_csv._Table, method, killed)
            with pytest.raises(_Stop):
                run(colour_bundle, photos, table)
        assert table.read_bytes() == b""
        run(colour_bundle, photos, table)
        assert table.read_bytes() == whole.read_bytes()
        table.unlink()


def test_a_finished_table_is_left_as_it_is(colour_bundle: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    run(colour_bundle, photos, table)
    before = table.read_bytes()
    assert run(colour_bundle, photos, table).resumed == 70
    assert table.read_bytes() == before


def _other_bundle(bundle: Path, photos: Path) -> dict[str, Any]:
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    return {}


def _other_images(bundle: Path, photos: Path) -> dict[str, Any]:
    shutil.copy(photos / "000.png", photos / "0001.png")
    return {}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_other_bundle, "bundle"),
        (_other_images, "images"),
        (lambda bundle, photos: {"top": 3}, "classes of an image"),
        (lambda bundle, photos: {"precision": "int8"}, "precision"),
        (lambda bundle, photos: {"added classes": ["fox"], "precision": "int8"}, "precision, added classes"),
    ],
)
def test_a_table_of_other_settings_or_images_is_refused_by_name_and_replaced_with_fresh(
    colour_bundle: Path, photos: Path, tmp_path: Path, change: Callable[[Path, Path], dict[str, Any]], found: str
) -> None:
    table = tmp_path / "out.csv"
    interrupted(colour_bundle, photos, table, 32)
    before = table.read_bytes()
    changes = change(colour_bundle, photos)
    with pytest.raises(CsvProblem) as caught:
        run(colour_bundle, photos, table, **changes)
    assert (caught.value.path, caught.value.found) == (table, found)
    assert "--fresh" in str(caught.value.remedy)
    assert table.read_bytes() == before
    assert run(colour_bundle, photos, table, fresh=True, **changes).resumed == 0
    assert len(rows(table)) == len(list(photos.iterdir()))


@pytest.mark.parametrize("damage", ["edited", "cut", "no state", "state of others", "half a state"])
def test_a_table_that_is_not_what_its_state_says_is_refused_and_kept(
    colour_bundle: Path, photos: Path, tmp_path: Path, damage: str
) -> None:
    table, state = tmp_path / "out.csv", tmp_path / "out.csv.state.json"
    interrupted(colour_bundle, photos, table, 32)
    if damage == "edited":
        table.write_bytes(table.read_bytes().replace(b"red", b"Red", 1))
    elif damage == "cut":
        table.write_bytes(table.read_bytes()[:-5])
    elif damage == "no state":
        state.unlink()
    elif damage == "state of others":
        state.write_text('{"format": "another"}')
    else:
        state.write_text(json.dumps({**json.loads(state.read_text()), "rows": None}))
    before = table.read_bytes()
    with pytest.raises(CsvProblem) as caught:
        run(colour_bundle, photos, table)
    assert "--fresh" in str(caught.value.remedy)
    assert table.read_bytes() == before


@pytest.mark.parametrize("files", [[], ["a.txt", "b.txt"]])
def test_a_folder_without_images_is_refused_and_no_table_is_made(
    colour_bundle: Path, tmp_path: Path, files: list[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("")
    with pytest.raises(CsvProblem) as caught:
        run(colour_bundle, folder, tmp_path / "out.csv")
    assert caught.value.path == folder
    assert (caught.value.found or "").endswith("2 .txt" if files else "")
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises(CsvProblem, match="no such folder"):
        run(colour_bundle, tmp_path / "nothing", tmp_path / "out.csv")


# --- predict.py ----------------------------------------------------------------------------------------


@pytest.fixture
def delivered(colour_bundle: Path) -> Path:
    (colour_bundle / "predict.py").write_text(standalone_predictor(), encoding="utf-8")
    return colour_bundle


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_bytes_of_an_undisturbed_one(delivered: Path, tmp_path: Path) -> None:
    folder, noise = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(4):  # large enough that a batch takes a while
        Image.fromarray(noise.integers(0, 256, (800, 800, 3), dtype=np.uint8)).save(folder / f"{i:03}.jpg")
    for i in range(4, 256):
        os.link(folder / f"{i % 4:03}.jpg", folder / f"{i:03}.jpg")
    (folder / "100.jpg").unlink()
    (folder / "100.jpg").write_bytes((folder / "000.jpg").read_bytes()[:9000])
    arguments = [sys.executable, "-I", str(delivered / "predict.py"), str(folder), "--csv"]
    table, state = tmp_path / "out.csv", tmp_path / "out.csv.state.json"
    process = subprocess.Popen([*arguments, str(table)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (state.exists() and json.loads(state.read_text())["rows"] >= 64) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = json.loads(state.read_text())["rows"]
    assert 64 <= done < 256
    resumed = subprocess.run([*arguments, str(table)], capture_output=True, text=True, check=True)
    assert resumed.stdout == f"{table}: 256 images, {done} of them from an earlier run; 1 could not be read\n"
    subprocess.run([*arguments, str(tmp_path / "whole.csv")], capture_output=True, check=True)
    assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(rows(table)) == 256


def test_the_file_says_how_many_images_it_classified_and_what_it_skipped(
    delivered: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "notes.txt").write_text("")
    arguments = ["--bundle", str(delivered), "--csv", str(tmp_path / "out.csv")]
    assert command.main([str(photos), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out.csv'}: 70 images; 2 could not be read\n"
    assert "1 file of another type is skipped: 1 .txt" in printed.err
    assert command.main([str(photos), *arguments, "--top", "1"]) == 1
    assert "--fresh" in capsys.readouterr().err
    assert command.main([str(photos), *arguments, "--top", "1", "--fresh"]) == 0


def test_the_status_is_1_where_no_image_could_be_read(delivered: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    arguments = [str(folder), "--bundle", str(delivered), "--csv", str(tmp_path / "out.csv")]
    assert command.main(arguments) == 1
    assert command.main(arguments) == 1
    assert [row["path"] for row in rows(tmp_path / "out.csv")] == ["a.png"]


@pytest.mark.parametrize("arguments", [["a", "b", "--csv", "c"], ["a", "--csv", "c", "--json"], ["a", "--fresh"]])
def test_options_that_exclude_each_other_are_misuse(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)


@pytest.mark.slow
def test_a_hyphen_reads_the_image_from_standard_input(delivered: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.png")
    line = [sys.executable, "-I", str(delivered / "predict.py"), "-", "--top", "1", "--json"]
    done = subprocess.run(line, input=(tmp_path / "blue.png").read_bytes(), capture_output=True, check=True)
    (record,) = json.loads(done.stdout)["predictions"]
    assert (record["image"], record["classes"][0]["class"]) == ("-", "blue")
    broken = subprocess.run(line, input=b"no picture", capture_output=True, check=False)
    assert broken.returncode == 1
    assert broken.stderr.startswith(b"error: ")
