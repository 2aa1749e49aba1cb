"""Whole commands by two processes, against the same by one."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from comkd_cli.data.digits import digits_source
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.model import Model
from tests import tiny, together, warm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EPOCHS, TRAIN, BATCH = 6, 200, 32
RUN = Path("tiny/few/seed1")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    optim = {**tiny.OPTIM, "epochs": EPOCHS}
    # With a worker, since a signal to stop reaches workers, too.
    data = {"folder": str(tiny.digits_folder(folder / "few", TRAIN, 60)), "workers": 1}
    recipe = tiny.recipe(data=data, optim=optim, teacher_cache={"views": 2, "dtype": "fp32"})
    with (folder / "tiny.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(recipe, stream)
    return folder


def alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run(*arguments, cwd=folder)


def two(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return together.run(2, *arguments, cwd=folder)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(workshop: Path) -> Path:
    """A run by one process; with its teacher, as both stages are shared."""
    ended = alone(workshop, "distill", "tiny.yaml", "--runs", "one")
    assert ended.returncode == 0, ended.stderr
    return workshop / "one"


@pytest.fixture(scope="module")
def two_processes(workshop: Path, one_process: Path) -> Path:
    """The same by two, interrupted on the way and resumed."""
    started = together.launch(2, "-m", "comkd_cli", "distill", "tiny.yaml", "--runs", "two", cwd=workshop)
    file = workshop / "two" / RUN / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not file.exists() or len(file.read_text().splitlines()) < 2:
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=120)
    assert said.count("checkpoint saved") == 1, said
    assert "torchrun --nproc-per-node 2 -m comkd_cli distill tiny.yaml --runs two" in said
    assert (workshop / "two" / RUN / "state/state.pt").is_file()
    shutil.copytree(workshop / "two", workshop / "two then one")

    ended = two(workshop, "distill", "tiny.yaml", "--runs", "two")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("resuming from epoch") == 1  # one process speaks
    assert ended.stdout.count("student.pt") == 3
    return workshop / "two"


def test_two_processes_end_where_one_does(one_process: Path, two_processes: Path) -> None:
    first, second = metrics(one_process), metrics(two_processes)
    assert len(first) == len(second) == EPOCHS
    for left, right in zip(first, second, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=0.02)
        assert right["if_align_gradient_share"] == pytest.approx(left["if_align_gradient_share"], abs=0.02)
        assert abs(right["test_top1_percent"] - left["test_top1_percent"]) < 2.5
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-3)


def test_one_process_resumes_what_two_began(workshop: Path, two_processes: Path) -> None:
    ended = alone(workshop, "distill", "tiny.yaml", "--runs", "two then one")
    assert ended.returncode == 0, ended.stderr
    assert "resuming from epoch" in ended.stderr
    first, second = metrics(two_processes), metrics(workshop / "two then one")
    assert [line["epoch"] for line in second] == list(range(1, EPOCHS + 1))
    for left, right in zip(first, second, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=0.02)


def damaged_folder(path: Path) -> dict[str, object]:
    """Twenty-four digits as files, two of which are no pictures."""
    images = digits_source().train
    path.mkdir()
    for index in range(24):
        images.open(index).save(path / f"{index:02}.png")
    for index in (3, 17):
        (path / f"{index:02}.png").write_bytes(b"no picture")
    return {"folder": str(path), "classes": ["a", "b"], "workers": 0, "holdout_percent": 0}


def test_what_one_process_cannot_read_all_know(workshop: Path) -> None:
    weights = workshop / "clip.pt"
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), weights)
    data = damaged_folder(workshop / "damaged")
    teacher = {"config": tiny.CLIP, "weights": str(weights)}
    optim = {**tiny.OPTIM, "epochs": 2, "batch_size": 12}
    with (workshop / "damaged.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(tiny.recipe(data=data, teacher=teacher, optim=optim), stream)
    ended = two(workshop, "distill", "damaged.yaml", "--runs", "damaged runs")
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if "unreadable, skipped" in line]
    assert sorted(name for line in told for name in ("03.png", "17.png") if name in line) == ["03.png", "17.png"]
    assert "2 of 24 images could not be read" in ended.stderr
    record = torch.load(workshop / "damaged runs/damaged/damaged/seed1/student.pt", weights_only=True)
    assert record["metrics"]["unreadable"] == 2
    ended = two(workshop, "distill", "damaged.yaml", "--runs", "too many", "--set", "data.unreadable_limit_percent=5")
    assert ended.returncode != 0
    assert ended.stderr.count("2 of 24 images (8.33 %) could not be read") == 1


def test_two_processes_train_the_digits_recipe_to_the_accuracy_of_one(workshop: Path) -> None:
    shorter = ["--set", "teacher.adapt.epochs=3", "--set", "optim.epochs=6", "--set", "optim.batch_size=64"]
    ended = warm.run("distill", "digits", "--runs", "digits", *shorter, cwd=workshop, digits=None)
    assert ended.returncode == 0, ended.stderr
    (workshop / "digits too").mkdir()
    (workshop / "digits too/teachers").symlink_to(workshop / "digits/teachers")
    ended = together.run(2, "distill", "digits", "--runs", "digits too", *shorter, cwd=workshop, digits=None)
    assert ended.returncode == 0, ended.stderr
    students = [workshop / runs / "digits/digits/seed1/student.pt" for runs in ("digits", "digits too")]
    first, second = (torch.load(path, weights_only=True)["metrics"]["test_top1_percent"] for path in students)
    assert first > 90
    # Rounding is amplified by training: of 360 images, some may fall to either side.
    assert abs(first - second) < 2


def test_the_teacher_of_two_processes_is_that_of_one(one_process: Path, two_processes: Path) -> None:
    (first,), (second,) = (list(folder.glob("teachers/*/metrics.jsonl")) for folder in (one_process, two_processes))
    lines = [json.loads(file.read_text().splitlines()[-1]) for file in (first, second)]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-3)


def test_two_processes_fill_one_cache(workshop: Path, two_processes: Path) -> None:
    (cache,) = (two_processes / "cache").iterdir()
    there = (cache / "there.bin").read_bytes()
    seen = EPOCHS // 2 * (TRAIN - TRAIN % BATCH)
    assert 1.9 * TRAIN < sum(there) <= min(len(there), 2 * seen)
    ended = two(workshop, "distill", "tiny.yaml", "--runs", "two", "--precompute")
    assert ended.returncode == 0, ended.stderr
    assert f"{2 * TRAIN} of {2 * TRAIN} crops cached" in ended.stderr
    assert sum((cache / "there.bin").read_bytes()) == 2 * TRAIN


def test_precomputing_by_two_equals_one(workshop: Path, one_process: Path, two_processes: Path) -> None:
    """With one teacher for both: its crops' features are the same, whoever computes them."""
    for runs in ("precomputed by one", "precomputed by two"):
        (workshop / runs).mkdir()
        (workshop / runs / "teachers").symlink_to(one_process / "teachers")
    assert alone(workshop, "distill", "tiny.yaml", "--runs", "precomputed by one", "--precompute").returncode == 0
    assert two(workshop, "distill", "tiny.yaml", "--runs", "precomputed by two", "--precompute").returncode == 0
    (first,), (second,) = ((workshop / f"precomputed by {who}/cache").iterdir() for who in ("one", "two"))
    assert first.name == second.name
    features = [np.fromfile(folder / "features.bin", np.float32) for folder in (first, second)]
    assert np.allclose(*features, atol=1e-5)
    assert np.abs(features[0]).sum() > 0


def test_two_processes_score_what_one_does(workshop: Path, one_process: Path) -> None:
    student = str(one_process / RUN / "student.pt")
    for who, runs in ((alone, "scored by one"), (two, "scored by two")):
        ended = who(workshop, "evaluate", student, "--runs", runs, "--out", runs)
        assert ended.returncode == 0, ended.stderr
    left, right = (
        json.loads((workshop / runs / "results.json").read_text()) for runs in ("scored by one", "scored by two")
    )
    assert left["records"] == right["records"]


def test_the_plan_is_printed_once(workshop: Path) -> None:
    ended = two(workshop, "distill", "tiny.yaml", "--runs", "planned", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"{TRAIN} training images") == 1
    assert "cpu, fp32, 2 processes" in ended.stdout
    assert not (workshop / "planned/tiny").exists()


def test_a_mistake_is_told_once(workshop: Path) -> None:
    ended = two(workshop, "distill", "tiny.yaml", "--set", "optim.epochs=none", "--runs", "none")
    assert ended.returncode != 0
    assert ended.stderr.count("optim.epochs") == 1


def test_without_a_launcher_a_scripts_own_variables_do_not_count(workshop: Path) -> None:
    ended = warm.run("distill", "tiny.yaml", "--dry-run", cwd=workshop, env={"WORLD_SIZE": "4"})
    assert ended.returncode == 0, ended.stderr
    assert f"{TRAIN} training images" in ended.stdout


def test_a_process_that_hangs_ends_the_run_within_its_timeout(workshop: Path) -> None:
    settings = ["--set", "collective_timeout_minutes=0.1", "--set", "optim.epochs=500"]
    first, second = together.start_ranks(2, "distill", "tiny.yaml", "--runs", "hanging", *settings, cwd=workshop)
    file = workshop / "hanging" / RUN / "metrics.jsonl"
    deadline = time.monotonic() + 200
    try:
        while not file.exists():
            assert first.poll() is None, first.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        stopped_at = time.monotonic()
        second.send_signal(signal.SIGSTOP)
        _, said = first.communicate(timeout=60)
    finally:
        second.kill()
        second.communicate()
    assert "did not answer within 0.1 minutes" in said
    assert time.monotonic() - stopped_at < 6 + 30
    assert "Traceback" not in said
    assert first.returncode == 1
