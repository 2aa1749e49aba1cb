"""Runs whose crops are cut from copies: the same student whatever copies exist, and never one of other crops."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comkd_cli.data.sources import open_source
from comkd_cli.errors import CheckpointError
from comkd_cli.flows import adapt, distill
from comkd_cli.models.checkpoints import load_student
from comkd_cli.recipe import parse_recipe
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four JPEG images of 180 x 150 pixels: crops of 20 % for 16 pixels need 36."""
    home = tmp_path_factory.mktemp("photos")
    for number in range(8):
        path = home / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((180, 150)).save(path, quality=92)
    return home


def make(folder: Path, runs: Path, **data: Any) -> tuple[distill.Run, adapt.Stage1]:
    recipe = parse_recipe(
        tiny.recipe(
            augment={"min_scale": 0.2},
            data={"folder": str(folder), "workers": 0, "holdout_percent": 0, **data},
            optim={**tiny.OPTIM, "batch_size": 4},
            teacher={"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 1, "batch_size": 4}},
            teacher_cache={"views": 2},
        )
    )
    source = open_source(recipe.data, Path("data"), runs)
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    return distill.Run(recipe, "it", source, runs, stage.contents, stage.key), stage


def train(run: distill.Run, stage: adapt.Stage1) -> dict[str, torch.Tensor]:
    accelerator = make_accelerator("fp32")
    teacher = adapt.TeacherPreparation(stage, accelerator, lambda event: None, "again")
    file = distill.distill(run, teacher, accelerator, lambda event: None, "again")
    return load_student(file)[0].state_dict()


def copies_of(runs: Path) -> list[Path]:
    return [path for path in (runs / "resized").rglob("*") if path.is_file()]


def test_a_run_has_one_student_whatever_copies_exist(photos: Path, tmp_path: Path) -> None:
    first = train(*make(photos, tmp_path / "cold"))
    assert len(copies_of(tmp_path / "cold")) == 8
    shutil.copytree(tmp_path / "cold/resized", tmp_path / "warm/resized")
    for path in copies_of(tmp_path / "warm")[:3]:
        path.unlink()
    for runs in (tmp_path / "warm", tmp_path / "cold"):
        shutil.rmtree(runs / "it", ignore_errors=True)
        again = train(*make(photos, runs))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert len(copies_of(runs)) == 8


def test_crops_of_copies_are_a_part_of_what_identifies_runs_teachers_and_caches(photos: Path, tmp_path: Path) -> None:
    run, stage = make(photos, tmp_path)
    train(run, stage)
    assert run.identity.parts["data"]["resized"] == 36  # ceil(16 / sqrt(0.2))
    other, other_stage = make(photos, tmp_path, resized="off")
    assert "resized" not in other.identity.parts["data"]
    assert other_stage.key != stage.key
    with pytest.raises(CheckpointError) as error:
        distill.finished(other)
    assert error.value.found == "data.resized: 36 in the finished run, not set now"
    same, same_stage = make(photos, tmp_path, resized=36)
    assert same_stage.key == stage.key
    assert distill.finished(same)
    shutil.rmtree(tmp_path / "it")
    train(other, other_stage)
    assert len(list((tmp_path / "cache").iterdir())) == 2
