"""What the tests of the flows share: a tiny run on digits, a tiny CLIP's weights, and a count of what teachers see."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from comkd_cli.data.sources import open_source
from comkd_cli.flows import adapt, distill
from comkd_cli.method.teacher import Teacher
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Model
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny
from tests.exported import export_once, run_graphs_here


@pytest.fixture(scope="module", autouse=True)
def short_exports(onnx_files: Path) -> Iterator[None]:
    """Each student is exported to ONNX once, and graphs start no process."""
    with pytest.MonkeyPatch.context() as patch:
        export_once(patch, onnx_files)
        run_graphs_here(patch)
        yield


@pytest.fixture(scope="session")
def tiny_student(shared: Path) -> Path:
    """student.pt of the tiny recipe, its teacher beside it; trained by one worker of pytest-xdist for all."""
    runs = shared / "runs of flows"
    recipe = parse_recipe(tiny.recipe())
    with FileLock(f"{runs}.lock"):
        source = open_source(recipe.data, Path("data"))
        stage = adapt.stage_1(recipe, source, Path("data"), runs)
        run = distill.Run(recipe, "tiny", source, runs, stage.contents, stage.key)
        accelerator = make_accelerator("fp32")
        teacher = adapt.TeacherPreparation(stage, accelerator, lambda event: None, "again")
        if not run.student_file.is_file():
            distill.distill(run, teacher, accelerator, lambda event: None, "again")
        return run.student_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), path)
    return path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many crops the teacher looked at, call by call, without those that pad a batch."""
    counts: list[int] = []
    encode = Teacher.encode

    def counted(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        counts.append(len(images.unique(dim=0)))
        return encode(self, images)

    monkeypatch.setattr(Teacher, "encode", counted)
    return counts
