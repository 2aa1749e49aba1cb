"""The time and the disk space of runs, worked out by hand from given costs, and measured on a tiny recipe."""

from pathlib import Path

import pytest
import torch

from comkd_cli.data.digits import digits_source
from comkd_cli.flows.estimate import Costs, Load, measure
from comkd_cli.models.checkpoints import load_student_state
from comkd_cli.recipe import parse_recipe
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

COSTS = Costs(
    teacher_step=(2.0, 0.5),
    student_step=1.0,
    teacher_features=0.25,
    student_features=0.125,
    decoding=0.0625,
    student_bytes=1000,
    teacher_bytes=300,
    feature_bytes=64,
)
LOAD = Load(classes=4, teacher_steps=10, teacher_scored=8, student_steps=20, student_scored=16, evaluated=32, train=100)
PROMPTS = {"arch": "ViT-B-32", "weights": "openai", "adapt": {"method": "promptsrc", "batch_size": 2}}
OPTIM = {"epochs": 4, "batch_size": 8}
# Stage 1: 10 steps of 2 + 4 * 0.5 s, 8 scored; stage 2: 20 steps of 8 images, 16 scored; then 32 by both.
COMPUTING = 10 * 4.0 + 8 * 0.25 + 20 * (1.0 + 8 * 0.25) + 16 * 0.125 + 32 * (0.25 + 0.125)
DECODED = 10 * 2 + 8 + 20 * 8 + 16 + 32


def test_on_a_cpu_the_cores_decode_and_train() -> None:
    recipe = parse_recipe(tiny.recipe(teacher=PROMPTS, optim=OPTIM))
    assert COSTS.seconds(recipe, LOAD, "cpu", workers=1) == pytest.approx(COMPUTING + DECODED * 0.0625)


def test_beside_a_gpu_the_slower_of_the_two_counts() -> None:
    recipe = parse_recipe(tiny.recipe(teacher=PROMPTS, optim=OPTIM))
    assert COSTS.seconds(recipe, LOAD, "cuda", workers=4) == pytest.approx(COMPUTING)
    slow = Costs(**{**vars(COSTS), "decoding": 10.0})
    assert slow.seconds(recipe, LOAD, "cuda", workers=4) == pytest.approx(DECODED * 10 / 4)


def test_with_a_teacher_cache_the_teacher_runs_once_for_each_view() -> None:
    cached = parse_recipe(tiny.recipe(teacher=PROMPTS, optim=OPTIM, teacher_cache={"views": 1, "dtype": "fp16"}))
    saved = 20 * 8 * 0.25 * 3 / 4
    assert COSTS.seconds(cached, LOAD, "cuda", workers=4) == pytest.approx(COMPUTING - saved)
    assert COSTS.cache_bytes(cached, LOAD) == 100 * 1 * 32  # half precision


def test_bytes_of_a_run_with_and_without_a_teacher_of_its_own() -> None:
    assert COSTS.kept_bytes(LOAD) == 1000 + 32 * 64 + 300 + 32 * 64
    assert COSTS.kept_bytes(Load(**{**vars(LOAD), "teacher_steps": 0})) == 1000 + 32 * 64
    assert COSTS.cache_bytes(parse_recipe(tiny.recipe()), LOAD) == 0


@pytest.mark.parametrize("adapt", ["promptsrc", "full", "none"])
def test_measured_costs_of_a_small_recipe(adapt: str, tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()  # never read
    teacher = {"config": tiny.CLIP, "weights": str(tmp_path / "weights.pt")}
    settings = {"method": adapt, **({"vision_depth": 1, "text_depth": 1} if adapt == "promptsrc" else {})}
    recipe = parse_recipe(tiny.recipe(teacher={**teacher, "adapt": settings}))
    costs = measure(recipe, 10, digits_source().train, make_accelerator("fp32"))
    assert costs.student_step > 0
    assert costs.teacher_features > 0
    assert costs.student_features > 0
    assert costs.decoding > 0
    assert (costs.teacher_step[0] > 0) == (adapt != "none")
    assert (costs.teacher_bytes > 0) == (adapt != "none")
    assert costs.feature_bytes == 4 * tiny.CLIP["embed_dim"]  # type: ignore[operator]
    # A student of the same recipe, as it was saved.
    _, state = load_student_state(tiny_student)
    held = sum(value.numel() * value.element_size() for value in state.values())
    assert held <= costs.student_bytes <= tiny_student.stat().st_size
    assert torch.is_grad_enabled()
