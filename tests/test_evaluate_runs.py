"""`comkd evaluate` as a process: accumulated results, failing models, full disks and narrow terminals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from comkd_cli.data.digits import digits_source
from tests import tiny, warm

pytestmark = pytest.mark.slow

ODD = "café 🦊"


def write_recipe(path: Path, **changes: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        YAML(typ="safe", pure=True).dump(tiny.recipe(**changes), stream)


def digits_folder(path: Path, classes: int = 3, images: int = 4) -> Path:
    """Digits as files in train/ and test/, with names that an ASCII terminal cannot show."""
    source = digits_source()
    for label in range(classes):
        positions = [i for i, own in enumerate(source.train.labels or ()) if own == label]
        for split, chosen in (("train", positions[:images]), ("test", positions[images : 2 * images])):
            for position in chosen:
                file = path / split / f"{ODD} {label}" / f"{position}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                source.train.open(position).save(file)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished students, of digits and of a folder with odd names."""
    folder = tmp_path_factory.mktemp("home")
    short = {**tiny.OPTIM, "epochs": 1, "batch_size": 4}
    digits_folder(folder / ODD)
    teacher = {"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 1, "batch_size": 4}}
    write_recipe(folder / "odd.yaml", data={"folder": ODD, "workers": 0}, teacher=teacher, optim=short)
    write_recipe(folder / "tiny.yaml", optim={**tiny.OPTIM, "epochs": 1})
    for recipe in ("odd.yaml", "tiny.yaml"):
        done = warm.run("distill", recipe, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


DIGITS = Path("runs/tiny/digits/seed1/student.pt")
OTHER = Path(f"runs/odd/{ODD}/seed1/student.pt")


def records(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["records"]
    return found


def test_a_narrower_evaluation_keeps_what_a_wider_one_found(home: Path) -> None:
    wide = warm.run("evaluate", "--out", "wide", "--protocol", "zero-shot", "--protocol", "base-to-novel", cwd=home)
    assert wide.returncode == 0, wide.stderr
    before = records(home / "wide")
    assert {r["dataset"] for r in before} == {"digits", ODD}
    narrow = warm.run("evaluate", DIGITS, "--out", "wide", "--json", cwd=home)
    assert narrow.returncode == 0, narrow.stderr
    printed = json.loads(narrow.stdout)["records"]
    assert {(r["dataset"], r["protocol"]) for r in printed} == {("digits", "zero-shot")}
    assert records(home / "wide") == before  # the same scores again
    once_more = warm.run("evaluate", OTHER, "--out", "wide", cwd=home)
    assert f"results.json: {len(before)} records in all" in once_more.stdout
    assert "digits" not in once_more.stdout


def test_training_a_student_again_removes_its_old_scores(home: Path) -> None:
    assert warm.run("distill", "tiny.yaml", "--runs", "again", cwd=home).returncode == 0
    assert warm.run("evaluate", "--runs", "again", cwd=home).returncode == 0
    assert {r["role"] for r in records(home / "again")} == {"student", "teacher"}
    fresh = warm.run("distill", "tiny.yaml", "--runs", "again", "--fresh", "--set", "optim.epochs=2", cwd=home)
    assert fresh.returncode == 0, fresh.stderr
    assert {r["role"] for r in records(home / "again")} == {"teacher"}


def test_one_model_that_fails_is_named_and_the_others_are_scored(home: Path) -> None:
    broken = home / "runs/broken/letters/seed1/student.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no student")
    try:
        scored = warm.run("evaluate", "--out", "failing", "--json", cwd=home)
        everything = warm.run("evaluate", "--all", "--shots", "1", "--seeds", "1", "--out", "failing", cwd=home)
    finally:
        broken.unlink()
    assert scored.returncode == 1
    assert "runs/broken/letters/seed1/student.pt: could not be loaded as a student" in scored.stderr
    assert "Traceback" not in scored.stderr
    document = json.loads(scored.stdout)
    assert {r["dataset"] for r in document["records"]} == {"digits", ODD}
    (missing,) = document["missing"]
    assert (missing["dataset"], missing["failed"]) == ("letters", True)
    assert missing["model"] == "runs/broken/letters/seed1/student.pt"
    assert {r["dataset"] for r in records(home / "failing")} == {"digits", ODD}
    assert everything.returncode == 1  # no dataset of the suite has a student here


def test_a_named_dataset_that_is_missing_is_exit_1(home: Path) -> None:
    scored = warm.run("evaluate", "--dataset", "digits", "--dataset", "dtd", "--out", "named", cwd=home)
    assert scored.returncode == 1
    assert "comkd distill RECIPE --dataset dtd" in scored.stderr
    assert {r["dataset"] for r in records(home / "named")} == {"digits"}


def test_a_student_is_scored_on_datasets_by_name(home: Path) -> None:
    """Not on the student's own data, and the results are not written to its folder."""
    scored = warm.run("evaluate", OTHER, "--dataset", "digits", "--dataset", "dtd", "--runs", "runs", cwd=home)
    assert scored.returncode == 1
    assert not (home / OTHER.parent / "results.json").exists()
    own = warm.run("evaluate", DIGITS, "--dataset", "digits", "--dataset", "dtd", "--out", "byname", cwd=home)
    assert own.returncode == 1
    assert {r["dataset"] for r in records(home / "byname")} == {"digits"}
    assert "dtd" in own.stderr


def test_ctrl_c_keeps_what_was_scored(home: Path) -> None:
    command = ["evaluate", "--out", "stopped", "--protocol", "few-shot"]
    command += ["--protocol", "zero-shot", "--shots", "1,2,4,8,16", "--seeds", "1,2,3,4,5,6,7,8,9"]
    started = warm.Process(*command, cwd=home)
    deadline = time.monotonic() + 120
    while not (home / "stopped/results.json").exists():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert "Traceback" not in said
    assert started.returncode in (0, 130)  # the second student may be done already
    assert records(home / "stopped")


# --- disks ---------------------------------------------------------------------------------------------


def test_results_that_cannot_be_written_are_an_error_at_the_start(home: Path) -> None:
    refused = warm.run("evaluate", DIGITS, "--out", "/proc/results", cwd=home)
    assert refused.returncode == 1
    assert "error: /proc/results: could not be written" in refused.stderr
    assert "--out" in refused.stderr
    assert "Scoring" not in refused.stderr


def test_features_that_cannot_be_stored_cost_no_score(home: Path) -> None:
    scored = warm.run("evaluate", DIGITS, "--runs", "/proc/runs", "--out", "unkept", cwd=home)
    assert scored.returncode == 0, scored.stderr
    assert scored.stderr.count("features could not be stored in /proc/runs/features") == 1  # student and teacher alike
    assert len(records(home / "unkept")) == 2


def test_a_full_disk_is_one_message_and_the_scores_are_printed(home: Path) -> None:
    """No file may have more than 4 kB: neither the features nor the tables fit."""
    command = ["evaluate", "--protocol", "few-shot", "--protocol", "zero-shot", "--shots", "1", "--seeds", "1,2,3"]
    done = warm.run(*command, "--runs", "runs", "--out", "full", "--json", cwd=home, most_bytes=4096)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "could not be written: File too large" in done.stderr
    assert len(json.loads(done.stdout)["records"]) > 20
    assert not (home / "full/results.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_message(home: Path) -> None:
    command = [sys.executable, "-m", "comkd_cli", "datasets", "list", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=home, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_runs_that_cannot_be_written_are_refused_before_the_teacher(home: Path) -> None:
    (home / "in the way/tiny").mkdir(parents=True)
    (home / "in the way/tiny/digits").touch()
    for runs in ("/proc/runs", "in the way"):
        refused = warm.run("distill", "tiny.yaml", "--runs", runs, cwd=home)
        assert refused.returncode == 1
        assert "could not be written" in refused.stderr
        assert "--runs" in refused.stderr
        assert "Teacher" not in refused.stderr
        assert "Traceback" not in refused.stderr


# --- terminals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_of_every_command_is_json_in_any_encoding(home: Path, onnx_files: Path, encoding: str) -> None:
    def run(*arguments: object) -> str:
        done = warm.run(*arguments, cwd=home, env={"PYTHONIOENCODING": encoding}, exported=onnx_files)
        assert done.returncode == 0, done.stderr
        return done.stdout

    bundle = home / f"bundle {encoding}"
    image = next((home / ODD).rglob("*.png"))
    commands = {
        "evaluate": ["evaluate", OTHER, "--json"],
        "export": ["export", OTHER, "--out", bundle, "--json"],
        "predict": ["predict", bundle, image, "--json"],
        "list": ["datasets", "list", "--json"],
    }
    documents = {name: json.loads(run(*arguments)) for name, arguments in commands.items()}
    assert {r["dataset"] for r in documents["evaluate"]["records"]} == {ODD}
    assert documents["export"]["data"] == ODD
    assert documents["predict"]["predictions"][0]["image"] == str(image)
    assert documents["predict"]["predictions"][0]["classes"][0]["class"].startswith(ODD)
    for arguments in (commands["evaluate"][:-1], commands["predict"][:-1], ["recipes", "show", "odd.yaml"]):
        plain = run(*arguments)
        assert "caf" in plain
    shown = YAML(typ="safe", pure=True).load(plain)
    assert shown["data"]["folder"] == ODD


def in_terminal(columns: int, home: Path, *arguments: object, **setup: Any) -> str:
    """What a command shows on a terminal of so many columns, without colours; bars overwrite their line."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    os.environ.pop("COLUMNS", None)
    env = {"TERM": "xterm", "NO_COLOR": "1"}
    with warm.Process(*arguments, cwd=home, env=env, terminal=follower, **setup) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
        os.close(leader)
    assert process.returncode == 0, shown.decode(errors="replace")
    return shown.decode(errors="replace")


@pytest.mark.parametrize("columns", [40, 60])
def test_narrow_terminals_show_whole_figures(home: Path, onnx_files: Path, columns: int) -> None:
    (home / "narrow").mkdir(exist_ok=True)
    arguments = ["evaluate", DIGITS, "--out", "narrow", "--protocol", "zero-shot", "--protocol", "base-to-novel"]
    shown = in_terminal(columns, home, *arguments)
    assert "…" not in shown
    for record in records(home / "narrow"):
        assert f"{record['top1_percent']:.2f}" in shown
        assert f"{record['image_tower_parameters']:,}" in shown
    listed = in_terminal(columns, home, "datasets", "list")
    assert "…" not in listed
    assert "1,281,167" in listed
    export = ["export", DIGITS, "--out", f"bundle {columns}", "--force"]
    exported = in_terminal(columns, home, *export, exported=onnx_files)
    assert "…" not in exported
    (parity,) = (
        entry["parity"]
        for entry in json.loads((home / f"bundle {columns}/manifest.json").read_text())["precisions"].values()
    )
    assert f"{parity['feature_cosine_min']:.6f}" in exported
    assert f"{parity['top1_agreement_percent']:.2f} %" in exported
    planned = in_terminal(columns, home, "distill", "tiny.yaml", "--dry-run")
    assert "…" not in planned
    assert "runs/tiny/digits/seed1" in planned
