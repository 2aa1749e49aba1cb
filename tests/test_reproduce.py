"""`comkd reproduce` by real processes: killed on the way, resumed, and compared with an undisturbed run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from comkd_cli.data.digits import digits_source
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.model import Model
from tests import tiny, warm

pytestmark = pytest.mark.slow

# Entries of the real split files: path, label and name of a class, numbers of its images.
SPLITS = {
    ("dtd", "images", "split_zhou_DescribableTextures.json"): [
        ("banded/banded_{:04}.jpg", 0, "banded"),
        ("blotchy/blotchy_{:04}.jpg", 1, "blotchy"),
        ("braided/braided_{:04}.jpg", 2, "braided"),
        ("bubbly/bubbly_{:04}.jpg", 3, "bubbly"),
    ],
    ("eurosat", "2750", "split_zhou_EuroSAT.json"): [
        ("AnnualCrop/AnnualCrop_{}.jpg", 0, "Annual Crop Land"),
        ("Forest/Forest_{}.jpg", 1, "Forest"),
        ("HerbaceousVegetation/HerbaceousVegetation_{}.jpg", 2, "Herbaceous Vegetation Land"),
        ("Highway/Highway_{}.jpg", 3, "Highway or Road"),
    ],
}
IMAGES = {"train": range(6), "val": range(6, 7), "test": range(7, 11)}
COMMAND = ["reproduce", "base-to-novel", "--method", "promptkd", "--recipe", "small.yaml", "--seeds", "1,2"]
DATASETS = ["--datasets", "dtd,eurosat,sun397"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of two datasets, two small CLIPs, and a recipe with them."""
    folder = tmp_path_factory.mktemp("home")
    digits = digits_source().train
    for (name, images, split_file), classes in SPLITS.items():
        splits: dict[str, list[list[object]]] = {split: [] for split in IMAGES}
        for path, label, class_name in classes:
            pictures = [i for i, own in enumerate(digits.labels or ()) if own == label]
            for split, numbers in IMAGES.items():
                for number in numbers:
                    file = folder / "data" / name / images / path.format(number)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    digits.open(pictures[number]).resize((24, 20), Image.Resampling.BICUBIC).save(file, "JPEG")
                    splits[split].append([path.format(number), label, class_name])
        (folder / "data" / name / split_file).write_text(json.dumps(splits))
    for name, seed in (("large", 3), ("small", 4)):
        (folder / name).mkdir()
        config = {"model_cfg": tiny.CLIP, "preprocess_cfg": {}}
        (folder / name / "open_clip_config.json").write_text(json.dumps(config))
        state = build_clip(Model(config=tiny.CLIP), seed=seed).model.state_dict()
        torch.save(state, folder / name / "open_clip_pytorch_model.bin")
    recipe = {
        "data": {"dataset": "eurosat", "workers": 0},
        "teacher": {
            "arch": "local-dir:large",
            "adapt": {
                **{"method": "promptsrc", "classes": "base", "shots": 4, "vision_depth": 2, "text_depth": 1},
                **{"epochs": 3, "batch_size": 2},
            },
        },
        "student": {"arch": "local-dir:small", "train": "prompts", "prompts": {"tokens": 2, "depth": 2}},
        "optim": {"epochs": 3, "batch_size": 4, "warmup_epochs": 0},
        "loss": {"if_align": None, "edu_attention": None},
    }
    with (folder / "small.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(recipe, stream)
    return folder


def kill_when(home: Path, ready: Callable[[], bool], *arguments: str) -> None:
    """Start a command and kill it as soon as it has got somewhere."""
    process = warm.Process(*arguments, cwd=home)
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()


def test_killed_twice_the_table_is_that_of_an_undisturbed_run(home: Path) -> None:
    disturbed = [*COMMAND, *DATASETS, "--runs", "killed"]
    runs = home / "killed"
    kill_when(home, lambda: any(runs.glob("teachers/dtd-*/state/state.pt")), *disturbed)
    assert not list(runs.glob("small/*/*/student.pt"))
    kill_when(home, lambda: (runs / "small/eurosat/seed1/state/state.pt").is_file(), *disturbed)
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("small/dtd/*/student.pt")}
    assert len(finished) == 2

    resumed = warm.run(*disturbed, cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not made again
    undisturbed = warm.run(*COMMAND, *DATASETS, "--runs", "whole", cwd=home)
    assert undisturbed.returncode == 0, undisturbed.stderr
    students = [path.relative_to(runs) for path in runs.glob("small/*/*/student.pt")]
    assert len(students) == 4
    for student_file in students:
        killed, whole = (torch.load(home / r / student_file, weights_only=True) for r in ("killed", "whole"))
        for name, value in killed["state_dict"].items():
            assert torch.equal(value, whole["state_dict"][name]), (student_file, name)
    name = "reproduce/base-to-novel-promptkd-small"
    for suffix in (".md", ".json"):
        assert (runs / f"{name}{suffix}").read_text() == (home / f"whole/{name}{suffix}").read_text()

    document = json.loads((runs / f"{name}.json").read_text())
    student = next(each for each in document["comparisons"] if each["role"] == "student")
    cells = {(cell["dataset"], cell["figure"]): cell for cell in student["cells"]}
    assert student["selection"] == "promptkd"
    for dataset, published in (("dtd", 85.84), ("eurosat", 97.54)):
        base = cells[dataset, "base"]
        records = [
            record["top1_percent"]
            for seed in (1, 2)
            for record in json.loads((runs / f"small/{dataset}/seed{seed}/results.json").read_text())["records"]
            if (record["role"], record["classes"]) == ("student", "base")
        ]
        assert base["ours"] == sum(records) / 2
        assert (base["published"], base["seeds"]) == (published, [1, 2])
        assert base["difference"] == pytest.approx(base["ours"] - published)
    assert cells["sun397", "base"]["ours"] is None
    assert "sun397 was not found" in student["reasons"]["sun397"]
    assert "sun397" in resumed.stdout
    assert "was not found" in resumed.stdout


def test_a_dry_run_says_what_is_left_and_runs_nothing(home: Path) -> None:
    planned = warm.run(*COMMAND, "--datasets", "dtd", "--runs", "planned", "--dry-run", cwd=home)
    assert planned.returncode == 0, planned.stderr
    assert "on this machine (cpu)" in planned.stdout
    assert "MB in planned" in planned.stdout
    assert not (home / "planned/small").exists()
    assert not (home / "planned/teachers").exists()
    assert not (home / "planned/reproduce").exists()


def test_a_run_that_fails_is_a_row_and_an_exit_code(home: Path) -> None:
    """The teacher needs ImageNet, which is missing."""
    words = ["--recipe", "small.yaml", "--set", "teacher.adapt.data={dataset: imagenet}", "--seeds", "1"]
    failed = warm.run("reproduce", "cross-dataset", *words, "--dataset", "dtd", "--json", cwd=home)
    assert failed.returncode == 1
    document = json.loads(failed.stdout)
    assert all("imagenet was not found" in each["reasons"]["dtd"] for each in document["comparisons"])
    assert "1 of 1 runs failed" in failed.stderr


def test_a_dataset_of_another_protocol_is_refused(home: Path) -> None:
    refused = warm.run("reproduce", "cross-dataset", "--dataset", "imagenet", cwd=home)
    assert refused.returncode == 2
    assert "allowed: caltech101" in refused.stderr
