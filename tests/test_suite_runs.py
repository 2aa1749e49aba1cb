"""The whole suite by real processes: killed, resumed, and distilled over several datasets."""

import json
import time
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.model import Model
from tests import tiny, warm
from tests.flows.test_suite import CLASSES, PER_CLASS, fill

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of all 15 datasets, a small random CLIP, and a recipe with it."""
    folder = tmp_path_factory.mktemp("home")
    for dataset in CATALOG.values():
        fill(dataset, folder / "data")
    (folder / "clip").mkdir()
    config = {"model_cfg": tiny.CLIP, "preprocess_cfg": {}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(config))
    state = build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict()
    torch.save(state, folder / "clip/open_clip_pytorch_model.bin")
    recipe = tiny.recipe(
        teacher={
            "arch": "local-dir:clip",
            "adapt": {"method": "promptsrc", "vision_depth": 1, "text_depth": 1, "epochs": 1},
        },
        optim={**tiny.OPTIM, "epochs": 1},
    )
    with (folder / "small.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(recipe, stream)
    return folder


def written(features: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in features.glob("*.safetensors")}


def test_a_killed_evaluation_resumes_and_repeats_no_finished_dataset(home: Path) -> None:
    arguments = ["evaluate", "local-dir:clip", "--all", "--shots", "1", "--seeds", "1", "--runs", "runs", "--json"]
    started = warm.Process(*arguments, cwd=home)
    features = home / "runs/features"
    deadline = time.monotonic() + 120
    while len(written(features)) < 9:
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    started.kill()
    started.communicate()
    before = written(features)
    # What was scored before the kill is kept: whole datasets, in the order of the suite.
    killed = json.loads((home / "runs/results.json").read_text())["records"]
    scored = list(dict.fromkeys(entry["dataset"] for entry in killed))
    assert scored == list(CATALOG)[: len(scored)]
    assert scored

    finished = warm.run(*arguments, cwd=home)
    assert finished.returncode == 0, finished.stderr
    after = written(features)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    records = json.loads(finished.stdout)["records"]
    zero = [entry for entry in records if entry["protocol"] == "zero-shot" and entry["method"] == "clip"]
    assert [entry["dataset"] for entry in zero] == list(CATALOG)
    assert {entry["images"] for entry in zero} == {CLASSES * PER_CLASS}

    again = warm.run(*arguments, cwd=home)
    assert json.loads(again.stdout) == json.loads(finished.stdout)
    assert written(features) == after


def test_students_of_several_datasets_are_trained_once_and_found(home: Path) -> None:
    few = ["--dataset", "dtd", "--dataset", "eurosat", "--seed", "1", "--seed", "2", "--runs", "students"]
    made = warm.run("distill", "small.yaml", *few, cwd=home)
    assert made.returncode == 0, made.stderr
    students = {path.relative_to(home).as_posix() for path in (home / "students").glob("*/*/*/student.pt")}
    assert students == {f"students/small/{name}/seed{k}/student.pt" for name in ("dtd", "eurosat") for k in (1, 2)}
    assert len(list((home / "students/teachers").iterdir())) == 2  # seeds share the teacher of a dataset

    once_more = warm.run("distill", "small.yaml", *few, cwd=home)
    assert once_more.stderr.count("already finished") == 4, once_more.stderr

    scored = warm.run("evaluate", "--all", "--shots", "1", "--seeds", "1", "--runs", "students", "--json", cwd=home)
    assert scored.returncode == 0, scored.stderr
    document = json.loads(scored.stdout)
    assert {(r["dataset"], r["seed"]) for r in document["records"] if r["role"] == "student" and r["seed"]} >= {
        ("dtd", 1),
        ("dtd", 2),
        ("eurosat", 1),
        ("eurosat", 2),
    }
    missing = {entry["dataset"]: entry["problem"] for entry in document["missing"]}
    assert set(missing) == set(CATALOG) - {"dtd", "eurosat"}
    assert "comkd distill RECIPE --dataset ucf101" in missing["ucf101"]


def test_a_missing_dataset_does_not_stop_the_others(home: Path) -> None:
    broken = home / "broken"
    fill(CATALOG["dtd"], broken)
    (broken / "eurosat").mkdir()
    made = warm.run("distill", "small.yaml", "--all", "--data-root", str(broken), "--runs", "more", cwd=home)
    assert made.returncode == 1
    assert "split_zhou_EuroSAT.json: is missing" in " ".join(made.stderr.split())
    assert "1 of 2 runs failed" in made.stderr
    assert (home / "more/small/dtd/seed1/student.pt").is_file()
