"""Each command as a real process, from recipe to prediction, killed and interrupted on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from ruamel.yaml import YAML

from comkd_cli.data.digits import digits_source
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.model import Model
from tests import tiny, warm

pytestmark = pytest.mark.slow
EPOCHS = 8


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    with (folder / "tiny.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(tiny.recipe(optim={**tiny.OPTIM, "epochs": EPOCHS}), stream)
    return folder


def comkd(folder: Path, *arguments: str, **setup: Any) -> subprocess.CompletedProcess[str]:
    return warm.run(*arguments, cwd=folder, **setup)


def start(folder: Path, *arguments: str) -> warm.Process:
    return warm.Process(*arguments, cwd=folder)


def wait_for_epoch(process: warm.Process, metrics: Path, epoch: int) -> None:
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < epoch:
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_from_recipe_to_prediction_through_every_interruption(workshop: Path) -> None:
    whole = comkd(workshop, "distill", "tiny.yaml", "--runs", "whole")
    assert whole.returncode == 0, whole.stderr
    reference = workshop / "whole/tiny/digits/seed1/student.pt"
    assert str(Path("whole/tiny/digits/seed1/student.pt")) in whole.stdout

    run = workshop / "broken/tiny/digits/seed1"
    killed = start(workshop, "distill", "tiny.yaml", "--runs", "broken")
    wait_for_epoch(killed, run / "metrics.jsonl", 2)
    killed.kill()
    killed.communicate()
    assert not (run / "student.pt").exists()

    interrupted = start(workshop, "distill", "tiny.yaml", "--runs", "broken")
    wait_for_epoch(interrupted, run / "metrics.jsonl", 4)
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert "comkd distill tiny.yaml --runs broken" in said
    assert "Traceback" not in said

    finished = comkd(workshop, "distill", "tiny.yaml", "--runs", "broken")
    assert finished.returncode == 0, finished.stderr
    assert "resuming from epoch" in finished.stderr
    assert (run / "student.pt").read_bytes() == reference.read_bytes()
    assert not (run / "state").exists()

    left = [folder / "state" for folder in (run, *(workshop / "broken/teachers").iterdir())]
    for folder in left:  # as a process leaves them that is killed between saving the model and deleting its checkpoint
        folder.mkdir()
        (folder / "state.pt").touch()
    written = (run / "student.pt").stat().st_mtime_ns
    again = comkd(workshop, "distill", "tiny.yaml", "--runs", "broken")
    assert again.returncode == 0
    assert "already finished" in again.stderr
    assert not left[0].exists()
    assert (run / "student.pt").stat().st_mtime_ns == written

    other = comkd(workshop, "distill", "tiny.yaml", "--runs", "broken", "--seed", "2", "--set", "optim.epochs=1")
    assert other.returncode == 0
    assert "reused from" in other.stderr
    assert not left[1].exists()

    scored = comkd(workshop, "evaluate", "broken/tiny/digits/seed1/student.pt", "--json", figures=True)
    assert scored.returncode == 0, scored.stderr
    student, teacher = json.loads(scored.stdout)["records"]
    assert (student["role"], teacher["role"]) == ("student", "teacher")
    assert json.loads((run / "results.json").read_text())["records"] == [student, teacher]

    exported = comkd(workshop, "export", "--onnx", "broken/tiny/digits/seed1/student.pt", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["format"] == "comkd-bundle/1"

    digits_source().train.open(0).save(workshop / "one.png")
    named = comkd(workshop, "predict", str(run / "bundle"), "one.png", "--json", "--top", "3")
    assert named.returncode == 0, named.stderr
    (prediction,) = json.loads(named.stdout)["predictions"]
    assert len(prediction["classes"]) == 3


def test_dry_run_prints_the_plan_and_writes_nothing(workshop: Path) -> None:
    planned = comkd(workshop, "distill", "tiny.yaml", "--runs", "nothing", "--dry-run", "--seed", "4")
    assert planned.returncode == 0, planned.stderr
    steps = f"{EPOCHS * (tiny.TRAIN // 32)} in all"
    for word in ("teacher", "trainable", steps, "cpu", "nothing/tiny/digits/seed4", "not trained yet"):
        assert word in planned.stdout
    assert not (workshop / "nothing").exists()


def test_a_dry_run_tells_once_what_the_data_of_student_and_teacher_leave_out(workshop: Path) -> None:
    digits = digits_source()
    for name in ("mine", "theirs"):
        for index in range(60):
            folder = workshop / name / "train" / f"digit_{(digits.train.labels or ())[index]}"
            folder.mkdir(parents=True, exist_ok=True)
            digits.train.open(index).save(folder / f"{index}.TIFF")
        (workshop / name / "train/digit_0/raw.psd").write_bytes(b"x")
        (workshop / name / "test/digit_0").mkdir(parents=True)
        digits.train.open(0).save(workshop / name / "test/digit_0/0.gif")
    classes = [f"digit_{digit}" for digit in range(10)]
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), workshop / "vectors.pt")
    adapted = {
        "method": "promptsrc",
        "data": {"folder": "theirs", "classes": classes},
        "epochs": 1,
        "vision_depth": 1,
        "text_depth": 1,
    }
    teacher = {"config": tiny.CLIP, "weights": "vectors.pt", "adapt": adapted}
    with (workshop / "folders.yaml").open("w") as stream:
        plain = tiny.recipe(data={"folder": "mine", "classes": classes}, teacher=teacher)
        YAML(typ="safe", pure=True).dump(plain, stream)
    planned = comkd(workshop, "distill", "folders.yaml", "--runs", "none", "--dry-run", "--seed", "1", "--seed", "2")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("60 training images, 1 test images, 10 classes") == 2
    said = planned.stderr
    for name in ("mine", "theirs"):
        assert said.count(f"{name}: 1 file of another type is skipped: 1 .psd") == 1
        assert said.count(f"{name}: no test images of: digit 1, digit 2, digit 3, digit 4, digit 5 and 4 more") == 1


def test_shards_of_a_server_are_planned_fetched_learned_from_scored_and_exported(workshop: Path) -> None:
    digits = digits_source().train
    (workshop / "served").mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(workshop / f"served/set-{shard}.tar"), encoder=True) as writer:
            for number in range(20 * shard, 20 * shard + 20):
                writer.write({"__key__": f"{number:04d}", "png": digits.open(number)})
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), workshop / "clip.pt")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", "served"]
    server = subprocess.Popen(
        command, cwd=workshop, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )
    try:
        port = server.stdout.readline().split("port ")[1].split()[0]  # type: ignore[union-attr]
        data = {
            "shards": f"http://127.0.0.1:{port}/set-{{0..2}}.tar",
            "classes": list("0123456789"),
            "workers": 1,
            "holdout_percent": 0,
        }
        teacher = {"config": tiny.CLIP, "weights": "clip.pt"}
        optim = {**tiny.OPTIM, "batch_size": 16}
        with (workshop / "shards.yaml").open("w") as stream:
            YAML(typ="safe", pure=True).dump(tiny.recipe(data=data, teacher=teacher, optim=optim), stream)
        planned = comkd(workshop, "distill", "shards.yaml", "--runs", "far", "--dry-run")
        assert planned.returncode == 0, planned.stderr
        assert "3 of 3 remote shards are not in" in " ".join(planned.stdout.split())
        done = comkd(workshop, "distill", "shards.yaml", "--runs", "far")
        assert done.returncode == 0, done.stderr
    finally:
        server.kill()
        server.communicate()
    planned = comkd(workshop, "distill", "shards.yaml", "--runs", "far", "--dry-run")
    assert "set: 60 training images, 0 test images, 10 classes" in " ".join(planned.stdout.split())
    assert "finished; --fresh repeats it" in planned.stdout
    student = "far/shards/set/seed1/student.pt"
    scored = comkd(workshop, "evaluate", student, "--runs", "far", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["records"][0]["images"] == 60
    exported = comkd(workshop, "export", student, "--runs", "far", "--json")
    assert exported.returncode == 0, exported.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "tiny.yaml"), "could not be loaded as a student"),
        (("export", "tiny.yaml"), "could not be loaded as a student"),
        (("distill", "tiny.yaml", "--set", "data.folder=nowhere"), "no such file or folder: nowhere, data/nowhere"),
        (("predict", ".", "one.png"), "no manifest.json"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_1(workshop: Path, arguments: tuple[str, ...], message: str) -> None:
    failed = comkd(workshop, *arguments)
    assert failed.returncode == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_half_precision_runs_on_a_cpu_as_bf16_and_fp16_is_refused(workshop: Path) -> None:
    for name in ("bf16", "fp16"):
        settings = ("--set", f"precision={name}", "--set", "optim.epochs=1", "--set", "teacher.adapt.epochs=1")
        done = comkd(workshop, "distill", "tiny.yaml", "--runs", name, *settings)
        if name == "bf16":
            assert done.returncode == 0, done.stderr
            state = torch.load(workshop / "bf16/tiny/digits/seed1/student.pt", weights_only=True)["state_dict"]
            assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
        elif not torch.cuda.is_available():
            assert done.returncode == 1
            assert "precision: needs a GPU: fp16" in done.stderr


def test_classes_that_look_the_same_to_the_teacher_are_refused(workshop: Path) -> None:
    template = "data.template=a very long photo of a small handwritten digit which is called {}"
    refused = comkd(workshop, "distill", "tiny.yaml", "--runs", "long", "--set", template)
    assert refused.returncode == 1
    assert "error: data.template: " in refused.stderr
    assert "shorten `data.template`" in refused.stderr
