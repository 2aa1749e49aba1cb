"""Recipe fields that change how a student's step is computed, and what they leave as it is."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.data.sources import open_source
from comkd_cli.errors import ModelError, RecipeError, TrainingError
from comkd_cli.flows import adapt, distill
from comkd_cli.models.backbones import build_image_tower, recompute_activations
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Model
from comkd_cli.runtime import cores, ranks
from comkd_cli.training import loop
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

pytestmark = pytest.mark.usefixtures("few_digits")


def train(runs: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The student's tensors after one epoch."""
    recipe = parse_recipe(tiny.recipe(**{"optim": {**tiny.OPTIM, "epochs": 1}, "evaluate_every_epochs": 0, **changes}))
    source = open_source(recipe.data, Path("data"))
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    run = distill.Run(recipe, "it", source, runs, stage.contents, stage.key)
    accelerator = make_accelerator("fp32")
    teacher = adapt.TeacherPreparation(stage, accelerator, lambda event: None, "")
    path = distill.distill(run, teacher, accelerator, lambda event: None, "", fresh=True)
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(runs: Path) -> dict[str, torch.Tensor]:
    return train(runs)


@pytest.mark.slow
def test_checkpointing_changes_no_bit(runs: Path, plain: dict[str, torch.Tensor]) -> None:
    found = train(runs, checkpointing=True)
    assert all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.slow
def test_checkpointing_changes_no_bit_of_a_teacher_of_prompts(tmp_path: Path) -> None:
    from comkd_cli.models.backbones import build_clip

    weights = tmp_path / "clip.pt"
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), weights)
    learned = {"method": "promptsrc", "epochs": 1, "shots": 2, "vision_depth": 2, "text_depth": 1}
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": learned}
    students = [train(tmp_path / str(on), teacher=teacher, checkpointing=on) for on in (False, True)]
    assert all(torch.equal(students[1][name], value) for name, value in students[0].items())


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    config = {**tiny.TOWER, "vision_cfg": {**tiny.TOWER["vision_cfg"], "layers": 6}}  # type: ignore[dict-item]
    tower = build_image_tower(Model(config=config)).module
    lean = copy.deepcopy(tower)
    recompute_activations(lean)
    images = torch.randn(4, 3, 16, 16)

    def kept(module: torch.nn.Module) -> int:
        sizes: list[int] = []

        def count(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(images)
        return sum(sizes)

    assert kept(lean) < kept(tower) / 3


def test_timm_towers_can_recompute_and_others_are_refused() -> None:
    vit = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none", "image_size": 160}
    tower = build_image_tower(Model(config={"embed_dim": 64, "vision_cfg": vit})).module
    recompute_activations(tower)
    assert tower.trunk.grad_checkpointing  # type: ignore[union-attr]
    convnet = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "none", "image_size": 64}
    normed = build_image_tower(Model(config={"embed_dim": 64, "vision_cfg": convnet})).module
    with pytest.raises(ModelError, match="checkpointing: the image tower has batch norms"):
        recompute_activations(normed)
    with pytest.raises(ModelError, match="checkpointing: the image tower does not support"):
        recompute_activations(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_parts_of_a_batch_train_a_student(runs: Path, plain: dict[str, torch.Tensor]) -> None:
    found = train(runs, optim={**tiny.OPTIM, "epochs": 1, "accumulation_steps": 4})
    # Statistics are those of a part, so that the student is another, though not by much.
    moved = {
        name: float((found[name] - value).norm() / value.norm()) for name, value in plain.items() if value.ndim > 1
    }
    assert 0 < max(moved.values()) < 0.5


def test_more_parts_than_pairs_of_images_are_refused_before_a_teacher_is_trained(tmp_path: Path) -> None:
    data = {"dataset": "digits"}
    with pytest.raises(RecipeError, match=r"optim: 17 parts of a batch of 32 have fewer than 2 images each"):
        train(tmp_path, data=data, optim={**tiny.OPTIM, "accumulation_steps": 17})
    few = open_source(parse_recipe(tiny.recipe()).data, Path("data")).train
    (tmp_path / "few").mkdir()
    for index in range(6):
        few.open(index).save(tmp_path / f"few/{index}.png")
    data = {"folder": str(tmp_path / "few"), "classes": ("a", "b"), "holdout_percent": 0}
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, data=data, optim={**tiny.OPTIM, "accumulation_steps": 4})
    assert (caught.value.field, caught.value.found, caught.value.allowed) == ("batch_size", 6, "at least 8")
    assert not (tmp_path / "teachers").exists()


@pytest.mark.slow
@pytest.mark.needs_tool("g++")
@pytest.mark.filterwarnings("ignore")  # of what torch.compile loads
def test_compiled_towers_train_the_same_student(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # in this process
    # Not AdamW, which makes steps of the rounding errors where a gradient is nothing.
    sgd = {"name": "sgd", "epochs": 1, "batch_size": 32, "learning_rate": 0.01, "warmup_epochs": 0}
    plain, compiled = (train(runs, optim=sgd, compile=on) for on in (False, True))
    for name, value in plain.items():
        assert torch.allclose(compiled[name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.slow
def test_both_stages_compute_in_as_many_threads_as_their_steps_are_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int | None] = []

    def limited(number: int | None) -> contextlib.AbstractContextManager[None]:
        threads.append(number)
        return contextlib.nullcontext()

    monkeypatch.setattr(loop, "limited_threads", limited)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ranks, "usable_cores", lambda: 64)
    train(tmp_path)
    assert threads == [1, 1]  # a tiny CLIP
    monkeypatch.setattr(cores, "LEAST_PER_THREAD", 1)
    train(tmp_path / "again")
    assert threads[2:] == [32, 32]  # a step of so few multiply-adds leaves half of the cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train(tmp_path / "last")
    assert threads[4:] == [None, None]
