"""Runs with a teacher cache against runs without one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.data.sources import open_source
from comkd_cli.errors import DataError, MisuseError
from comkd_cli.events import Event, Notice
from comkd_cli.flows import adapt, distill
from comkd_cli.recipe import parse_recipe
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

pytestmark = pytest.mark.usefixtures("few_digits")

EPOCHS = 2


def make(runs: Path, weights: Path, name: str, cache: dict[str, Any] | None, **changes: Any):  # type: ignore[no-untyped-def]
    teacher = {"config": tiny.CLIP, "weights": str(weights)}
    optim = {**tiny.OPTIM, "epochs": EPOCHS}
    fields = {"teacher": teacher, "optim": optim, "teacher_cache": cache, "evaluate_every_epochs": 0, **changes}
    recipe = parse_recipe(tiny.recipe(**fields))
    source = open_source(recipe.data, Path("data"))
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    return distill.Run(recipe, name, source, runs, stage.contents, stage.key), stage


def do(pair, events: list[Event] | None = None) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    run, stage = pair
    report = (events if events is not None else []).append
    accelerator = make_accelerator("fp32")
    path = distill.distill(run, adapt.TeacherPreparation(stage, accelerator, report, ""), accelerator, report, "")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


FULL = {"views": EPOCHS, "dtype": "fp32"}


@pytest.mark.slow
def test_with_a_view_an_epoch_in_fp32_a_run_is_the_one_without_a_cache(
    tmp_path: Path, weights: Path, seen: list[int]
) -> None:
    plain = do(make(tmp_path, weights, "plain", None))
    computed = sum(seen)
    cold = do(make(tmp_path, weights, "cold", FULL))
    assert sum(seen) == 2 * computed
    warm = do(make(tmp_path, weights, "warm", FULL))
    assert sum(seen) == 2 * computed  # the teacher did not run again
    assert same(plain, cold)
    assert same(plain, warm)


@pytest.mark.slow
def test_mixed_and_changed_crops_are_cached_as_others_are(tmp_path: Path, weights: Path, seen: list[int]) -> None:
    augment = {"mix": {"kind": "cutmix"}, "rand_augment": {"magnitude": 20}}
    plain = do(make(tmp_path, weights, "plain", None, augment=augment, ema_decay=0.9))
    cold = do(make(tmp_path, weights, "cold", FULL, augment=augment, ema_decay=0.9))
    computed = sum(seen)
    warm = do(make(tmp_path, weights, "warm", FULL, augment=augment, ema_decay=0.9))
    assert sum(seen) == computed
    assert same(plain, cold)
    assert same(plain, warm)
    assert not same(plain, do(make(tmp_path, weights, "unmixed", None, ema_decay=0.9)))


def test_students_with_and_without_mixed_crops_share_a_teacher(tmp_path: Path) -> None:
    def key(**augment: Any) -> str:
        teacher = {"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 1, "batch_size": 32}}
        recipe = parse_recipe(tiny.recipe(teacher=teacher, augment=augment))
        return adapt.stage_1(recipe, open_source(recipe.data, Path("data")), Path("data"), tmp_path).key

    assert key(mix={"kind": "mixup"}, rand_augment={}) == key()
    assert key(min_scale=0.3) != key()


@pytest.mark.slow
def test_other_students_and_seeds_read_what_one_has_filled(tmp_path: Path, weights: Path, seen: list[int]) -> None:
    do(make(tmp_path, weights, "first", FULL))
    computed = sum(seen)
    events: list[Event] = []
    do(make(tmp_path, weights, "other loss", FULL, loss={"refinement": {"weight": 3.0}, "if_align": None}), events)
    assert sum(seen) == computed
    do(make(tmp_path, weights, "first", FULL, seed=2), events)
    # Another order leaves out other images at the end of an epoch: those alone are new.
    assert 0 < sum(seen) - computed <= EPOCHS * (tiny.TRAIN % 32)
    texts = [event.text for event in events if isinstance(event, Notice) and "crops read" in event.text]
    assert len(texts) == 2


@pytest.mark.slow
def test_fewer_views_than_epochs_repeat_them(tmp_path: Path, weights: Path, seen: list[int]) -> None:
    do(make(tmp_path, weights, "one", {"views": 1}))
    assert sum(seen) <= tiny.TRAIN


@pytest.mark.slow
def test_precomputing_leaves_nothing_to_compute(tmp_path: Path, weights: Path, seen: list[int]) -> None:
    run, stage = make(tmp_path, weights, "later", {"views": 2})
    accelerator = make_accelerator("fp32")
    for _ in range(2):  # the second time there is nothing left to do
        distill.precompute(run, adapt.TeacherPreparation(stage, accelerator, print, ""), accelerator, lambda e: None)
        assert sum(seen) == 2 * tiny.TRAIN
    do((run, stage))
    assert sum(seen) == 2 * tiny.TRAIN


@pytest.mark.slow
def test_another_teacher_crop_or_seed_has_another_cache(tmp_path: Path, weights: Path, seen: list[int]) -> None:
    do(make(tmp_path, weights, "first", FULL))
    for number, changes in enumerate(({"augment": {"min_scale": 0.5}}, {"precision": "bf16"})):
        before = sum(seen)
        do(make(tmp_path, weights, f"other{number}", FULL, **changes))
        assert sum(seen) > before
    before = sum(seen)
    do(make(tmp_path, weights, "other seed", {**FULL, "seed": 9}))
    assert sum(seen) > before


def test_a_recipe_without_a_cache_cannot_be_precomputed(tmp_path: Path, weights: Path) -> None:
    run, stage = make(tmp_path, weights, "none", None)
    accelerator = make_accelerator("fp32")
    with pytest.raises(MisuseError) as caught:
        distill.precompute(run, adapt.TeacherPreparation(stage, accelerator, print, ""), accelerator, print)
    assert caught.value.field == "teacher_cache"


def folder_of(path: Path, first: int) -> dict[str, Any]:
    """Twelve digits as bitmaps, all of one size and called alike wherever they are from."""
    images = open_source(parse_recipe(tiny.recipe()).data, Path("data")).train
    path.mkdir()
    for index in range(12):
        images.open(first + index).save(path / f"{index}.bmp")
    return {"folder": str(path), "classes": ("a", "b"), "holdout_percent": 0}


@pytest.mark.slow
def test_other_images_with_the_same_file_names_have_another_cache(
    tmp_path: Path, weights: Path, seen: list[int]
) -> None:
    optim = {**tiny.OPTIM, "epochs": EPOCHS, "batch_size": 6}
    for name, first in (("one", 0), ("other", 100)):
        before = sum(seen)
        do(make(tmp_path / "runs", weights, name, FULL, data=folder_of(tmp_path / name, first), optim=optim))
        assert sum(seen) - before == EPOCHS * 12


@pytest.mark.slow
def test_precomputing_names_unreadable_images_and_stops_above_the_limit(tmp_path: Path, weights: Path) -> None:
    data = folder_of(tmp_path / "pictures", 0)
    (tmp_path / "pictures/3.bmp").write_bytes(b"no picture")
    events: list[Event] = []

    def fill(limit: float) -> None:
        limited = {**data, "unreadable_limit_percent": limit}
        run, stage = make(tmp_path / "runs", weights, "it", {"views": 1}, data=limited)
        accelerator = make_accelerator("fp32")
        distill.precompute(
            run, adapt.TeacherPreparation(stage, accelerator, events.append, ""), accelerator, events.append
        )

    fill(10.0)
    assert any("3.bmp" in event.text for event in events if isinstance(event, Notice))
    with pytest.raises(DataError, match=r"1 of 12 images(.|\n)*3\.bmp"):
        fill(5.0)


@pytest.mark.slow
def test_a_retrained_teacher_has_another_cache(tmp_path: Path, weights: Path) -> None:
    """Its settings are the same, and its weights need not be: on another machine, by other threads."""
    folders = []
    for number in range(2):
        run, stage = make(tmp_path / str(number), weights, "it", {"views": 1}, teacher=tiny.recipe()["teacher"])
        ready = adapt.TeacherPreparation(stage, make_accelerator("fp32"), lambda event: None, "").prepare()
        assert ready.checkpoint is not None
        if number:
            saved = torch.load(ready.checkpoint, weights_only=True)
            next(iter(saved["state_dict"].values())).add_(1e-6)
            torch.save(saved, ready.checkpoint)
        cache = distill.open_cache(run, ready, lambda event: None)
        assert cache is not None
        folders.append(cache.folder.name)
    assert folders[0] != folders[1]
