"""Runs that learn from shards: stopped, with workers, with a teacher cache, planned, scored."""

import io
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from comkd_cli.data import order
from comkd_cli.data.digits import digits_source
from comkd_cli.data.sources import open_source
from comkd_cli.errors import DataError, Interrupted
from comkd_cli.evaluation import scoring
from comkd_cli.events import Event, Notice, Progress
from comkd_cli.flows import adapt, distill, evaluate
from comkd_cli.recipe import parse_recipe
from comkd_cli.training import loop
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

IMAGES, SHARDS, BATCH, EPOCHS = 90, 6, 16, 2


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_RUNS", 2)
    monkeypatch.setattr(loop, "REPORT_EVERY_SECONDS", 0.0)


def write_shards(folder: Path, numbers: Sequence[int], shards: int = SHARDS) -> str:
    """Digits by their numbers, in so many shards; the pattern that names these."""
    folder.mkdir()
    digits = digits_source().train
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"digits-{shard}.tar"), encoder=True) as writer:
            for number in numbers[shard * len(numbers) // shards : (shard + 1) * len(numbers) // shards]:
                writer.write({"__key__": f"{number:04d}", "png": digits.open(number), "txt": "a digit"})
    return f"{folder}/digits-{{0..{shards - 1}}}.tar"


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", range(IMAGES))


Pair = tuple[distill.Run, Callable[[Callable[[Event], None]], adapt.TeacherPreparation]]


def make(runs: Path, weights: Path, data: dict[str, Any], **changes: Any) -> Pair:
    fields = {
        "data": {"classes": [str(digit) for digit in range(10)], "workers": 0, "holdout_percent": 0, **data},
        "teacher": {"config": tiny.CLIP, "weights": str(weights)},
        "optim": {**tiny.OPTIM, "epochs": EPOCHS, "batch_size": BATCH},
        **changes,
    }
    recipe = parse_recipe(tiny.recipe(**fields))
    source = open_source(recipe.data, Path("data"), runs)
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    run = distill.Run(recipe, "it", source, runs, stage.contents, stage.key)
    accelerator = make_accelerator("fp32")
    return run, lambda report: adapt.TeacherPreparation(stage, accelerator, report, "")


def do(pair: Pair, report: Callable[[Event], None] = lambda event: None) -> dict[str, torch.Tensor]:
    run, teach = pair
    path = distill.distill(run, teach(report), make_accelerator("fp32"), report, "again")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_run_that_was_stopped_within_windows_ends_with_the_same_bits(
    tmp_path: Path, weights: Path, pattern: str
) -> None:
    whole = do(make(tmp_path / "whole", weights, {"shards": pattern}))
    for steps in (2, 4, 7):

        def stop(event: Event, steps: int = steps) -> None:
            if isinstance(event, Progress) and event.label.startswith("student") and event.done == steps * BATCH:
                os.kill(os.getpid(), signal.SIGINT)

        pair = make(tmp_path / str(steps), weights, {"shards": pattern})
        with pytest.raises(Interrupted):
            do(pair, stop)
        told: list[Event] = []
        again = make(tmp_path / str(steps), weights, {"shards": pattern})  # as another process opens it
        assert same(do(again, told.append), whole)
        assert any(isinstance(event, Notice) and "resuming from" in event.text for event in told)


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path, weights: Path, pattern: str) -> None:
    alone = do(make(tmp_path / "alone", weights, {"shards": pattern}))
    assert same(do(make(tmp_path / "two", weights, {"shards": pattern, "workers": 2})), alone)


@pytest.mark.slow
def test_the_same_images_in_other_shards_find_the_same_cache(
    tmp_path: Path, weights: Path, pattern: str, seen: list[int]
) -> None:
    cache = {"views": EPOCHS}
    run, teach = make(tmp_path, weights, {"shards": pattern}, teacher_cache=cache)
    distill.precompute(run, teach(print), make_accelerator("fp32"), lambda event: None)
    assert sum(seen) == EPOCHS * IMAGES
    do((run, teach))
    mixed = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(5)).tolist()
    packed = write_shards(tmp_path / "packed", mixed, shards=4)
    told: list[Event] = []
    other, teach_other = make(tmp_path, weights, {"shards": packed}, teacher_cache=cache)
    assert distill.finished(other)  # what it learned from is the same
    distill.distill(other, teach_other(print), make_accelerator("fp32"), told.append, "", fresh=True)
    assert sum(seen) == EPOCHS * IMAGES  # the teacher did not run again
    assert any(
        isinstance(e, Notice) and f"{EPOCHS * IMAGES:,} of {EPOCHS * IMAGES:,} crops cached" in e.text for e in told
    )


@pytest.mark.slow
def test_what_a_repacked_cache_gives_for_a_key_is_what_the_teacher_says_of_it(
    tmp_path: Path, weights: Path, pattern: str
) -> None:
    cache = {"views": 1, "dtype": "fp32"}
    found: list[dict[str, torch.Tensor]] = []
    for runs, shards in (("a", pattern), ("b", write_shards(tmp_path / "turned", range(IMAGES)[::-1], shards=3))):
        run, teach = make(tmp_path / runs, weights, {"shards": shards}, teacher_cache=cache)
        distill.precompute(run, teach(print), make_accelerator("fp32"), lambda event: None)
        kept = distill.open_cache(run, teach(print).prepare(), lambda event: None)
        assert kept is not None
        keys = list(run.source.train.keys)
        values = torch.from_numpy(kept.read(0, torch.arange(IMAGES).numpy()))
        found.append(dict(zip(keys, values, strict=True)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-5) for key in found[0])
    assert not torch.allclose(found[0]["0000"], found[0]["0001"], atol=1e-3)


def test_a_shard_that_was_replaced_by_one_of_the_same_names_and_sizes_has_another_cache(
    tmp_path: Path, weights: Path
) -> None:
    caches = []
    for number, last in enumerate((3, 9)):
        shard = tmp_path / f"{number}/digits-0.tar"
        shard.parent.mkdir()
        with webdataset.TarWriter(str(shard), encoder=False, mtime=0) as writer:
            for i, shade in enumerate((0, 1, 2, last)):
                writer.write({"__key__": f"{i:04d}", "bmp": flat(shade)})
        run, teach = make(tmp_path / "runs", weights, {"shards": str(shard)}, teacher_cache={"views": 1})
        cache = distill.open_cache(run, teach(print).prepare(), lambda event: None)
        assert cache is not None
        caches.append((shard.stat().st_size, cache.folder))
    assert caches[0][0] == caches[1][0]
    assert caches[0][1] != caches[1][1]


def flat(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "BMP")
    return stream.getvalue()


def test_a_plan_counts_the_images_of_shards(tmp_path: Path, weights: Path, pattern: str) -> None:
    run, _ = make(tmp_path, weights, {"shards": pattern})
    planned = distill.plan(run)
    assert (planned.steps_per_epoch, planned.state) == (IMAGES // BATCH, "new")
    assert planned.folder == tmp_path / "it/digits/seed1"


@pytest.mark.slow
def test_a_student_of_shards_is_scored_by_agreement_on_some_of_them(
    tmp_path: Path, weights: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(tmp_path, weights, {"shards": pattern})
    do(pair)
    monkeypatch.setattr(scoring, "MOST_FOR_AGREEMENT", 30)
    told: list[Event] = []
    bench = evaluate.Bench(torch.device("cpu"), tmp_path, told.append)
    records = evaluate.evaluate(str(pair[0].student_file), tmp_path, bench).records
    assert [(record.role, record.images) for record in records] == [("student", 30), ("teacher", 30)]
    assert records[0].agreement_percent is not None
    assert any(isinstance(event, Notice) and "30 of 90 images" in event.text for event in told)
    assert [path.name for path in tmp_path.glob("shards/*/index.json")] == ["index.json"]


def test_images_without_labels_cannot_adapt_a_teacher(tmp_path: Path, weights: Path, pattern: str) -> None:
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": {"method": "full", "epochs": 1}}
    run, teach = make(tmp_path, weights, {"shards": pattern}, teacher=teacher)
    with pytest.raises(DataError) as caught:
        do((run, teach))
    assert (caught.value.path, caught.value.field, caught.value.found) == ("digits", "teacher.adapt", "full")


@pytest.mark.slow
def test_held_out_images_of_shards_are_measured_on_alone_however_they_are_packed(
    tmp_path: Path, weights: Path, pattern: str
) -> None:
    data = {"shards": pattern, "holdout_percent": 30}
    pair = make(tmp_path / "runs", weights, data, teacher_cache={"views": 1})
    run = pair[0]
    assert run.source.test is not None
    assert len(run.source.train) + len(run.source.test) == IMAGES
    do(pair)
    cache = distill.open_cache(run, pair[1](print).prepare(), lambda event: None)
    assert cache is not None
    assert cache.key.images == len(run.source.train)
    bench = evaluate.Bench(torch.device("cpu"), tmp_path, lambda event: None, runs=tmp_path / "runs")
    student = evaluate.evaluate(str(run.student_file), tmp_path / "runs", bench).records[0]
    assert (student.images, student.images_from) == (len(run.source.test), "held-out")
    packed = write_shards(tmp_path / "packed", range(IMAGES)[::-1], shards=4)
    assert distill.finished(make(tmp_path / "runs", weights, {**data, "shards": packed}, teacher_cache={"views": 1})[0])
