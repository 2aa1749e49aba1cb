"""Runs on a folder of which a part of the training images has a label, by labels.csv."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from comkd_cli.data.digits import digits_source
from comkd_cli.data.loaders import Crops, Steps, TrainingLoader, scoring_batches
from comkd_cli.data.sources import open_source
from comkd_cli.errors import CheckpointError, DataError, ExportError
from comkd_cli.evaluation.zero_shot import Scorer
from comkd_cli.events import Event, Notice, Stage
from comkd_cli.flows import adapt, distill
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.flows.export import ExportOptions, export
from comkd_cli.method.linear_probe import Classifier, Labelled, fit_probe
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.models.checkpoints import load_student, load_teacher
from comkd_cli.recipe import parse_recipe
from comkd_cli.teachers.cached import CachedTeacher
from comkd_cli.teachers.class_vectors import encode_prompts
from comkd_cli.teachers.loading import load_saved_teacher
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

PROBE = {"method": "linear_probe", "strengths": [1.0, 0.01, 0.001]}
IMAGES, LABELLED = 300, 90


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training and 60 test images of digits as PNGs, and the labels of 30 % of the training images in a CSV."""
    folder = tmp_path_factory.mktemp("data") / "scans"
    digits = digits_source()
    assert digits.test is not None
    for images, count, by_class in ((digits.train, IMAGES, False), (digits.test, 60, True)):
        for index in range(count):
            place = f"test/{(images.labels or ())[index]}" if by_class else "train"
            (folder / place).mkdir(parents=True, exist_ok=True)
            images.open(index).save(folder / place / f"{index:03}.png")
    labels = digits.train.labels or ()
    rows = [f"train/{index:03}.png,{labels[index]}" for index in range(LABELLED)]
    (folder / "labels.csv").write_text("\n".join(["path,class", *rows]))
    return folder


def recipe_on(folder: Path, weights: Path, **changes: Any) -> dict[str, Any]:
    data = {"folder": str(folder), "labels": "labels.csv", "template": "a photo of the digit {}.", "workers": 0}
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": changes.pop("adapt", PROBE)}
    return tiny.recipe(data=data, teacher=teacher, optim={**tiny.OPTIM, "batch_size": 50}, **changes)


def make_stage(folder: Path, weights: Path, runs: Path, **changes: Any) -> adapt.Stage1:
    recipe = parse_recipe(recipe_on(folder, weights, **changes))
    return adapt.stage_1(recipe, open_source(recipe.data, runs, runs), runs, runs)


def preparation(stage: adapt.Stage1, events: list[Event]) -> adapt.TeacherPreparation:
    return adapt.TeacherPreparation(stage, make_accelerator("fp32"), events.append, "again")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, pictures: Path, weights: Path) -> tuple[adapt.Stage1, list[Event]]:
    events: list[Event] = []
    stage = make_stage(pictures, weights, tmp_path_factory.mktemp("runs"))
    preparation(stage, events).prepare()
    return stage, events


@pytest.mark.slow
def test_the_probed_teacher_is_the_fit_of_the_centre_crops(done: tuple[adapt.Stage1, list[Event]]) -> None:
    stage, _ = done
    clip = build_clip(stage.settings)
    images = stage.source.train.subset(list(range(LABELLED)))
    with torch.no_grad():
        features = torch.cat(
            [clip.model.visual(b.inputs[0]) for b in scoring_batches(images, clip.preprocessing, 64, 0)]  # type: ignore[operator]
        )
    vectors = encode_prompts(clip, stage.source.class_names, stage.source.template, torch.device("cpu"))
    scale = clip.model.logit_scale.exp().detach()  # type: ignore[operator]
    truth = torch.tensor(digits_source().train.labels)[:LABELLED]
    probe = fit_probe(
        Labelled(normalize(features, dim=1), truth), Classifier(vectors, scale), PROBE["strengths"], 20.0, 1
    )
    saved = load_teacher(stage.file)
    assert probe.improves
    torch.testing.assert_close(saved.class_vectors, probe.classifier.vectors, atol=1e-4, rtol=0)
    torch.testing.assert_close(saved.logit_scale, probe.classifier.scale, rtol=1e-4, atol=0)
    metrics = saved.record.metrics
    assert metrics["validation_top1_percent"] == pytest.approx(probe.top1_percent)
    assert metrics["validation_zero_shot_top1_percent"] == pytest.approx(probe.zero_shot_top1_percent)
    assert (metrics["labelled_images"], metrics["validation_images"]) == (LABELLED, probe.validation_images)
    assert (metrics["strength"], metrics["zero_shot_kept"], metrics["test_images"]) == (probe.strength, 0.0, 60)
    assert json.loads((stage.folder / "metrics.jsonl").read_text()) == metrics
    assert not saved.state_dict


def test_a_probed_teacher_is_reused_and_belongs_to_its_labels_and_settings(
    done: tuple[adapt.Stage1, list[Event]], pictures: Path, weights: Path
) -> None:
    stage, first = done
    (title,) = [event.title for event in first if isinstance(event, Stage)]
    assert title == "Teacher: fitting class vectors to 90 labelled images of scans"
    events: list[Event] = []
    ready = preparation(make_stage(pictures, weights, stage.runs, seed=5, augment={"flip": True}), events).prepare()
    assert [e.title for e in events if isinstance(e, Stage)] == [f"Teacher: reused from {stage.file}"]
    images = torch.rand(3, 3, 16, 16)
    clip = build_clip(stage.settings)
    with torch.no_grad():
        features = normalize(clip.model.encode_image(images), dim=1)  # type: ignore[operator]
    saved = load_teacher(stage.file)
    torch.testing.assert_close(ready.teacher(images).logits, saved.logit_scale * features @ saved.class_vectors.T)
    for adaptation in ({**PROBE, "seed": 2}, {**PROBE, "validation_percent": 30.0}, {**PROBE, "strengths": [1.0]}):
        assert make_stage(pictures, weights, stage.runs, adapt=adaptation).folder != stage.folder
    fewer = stage.adaptation_source.train.subset(list(range(LABELLED - 1)))
    assert replace(stage, adaptation_source=replace(stage.adaptation_source, train=fewer)).key != stage.key
    with pytest.raises(CheckpointError, match="classes that differ from those of the data"):
        load_saved_teacher(stage.file, ("a", "b"), torch.device("cpu"))


@pytest.mark.slow
def test_the_whole_run_trains_scores_and_exports(
    done: tuple[adapt.Stage1, list[Event]], pictures: Path, weights: Path, tmp_path: Path
) -> None:
    loss = {**tiny.recipe()["loss"], "labels": {"weight": 0.5}}
    stage = make_stage(pictures, weights, done[0].runs, loss=loss)
    run = distill.Run(stage.recipe, "few", stage.source, stage.runs, stage.contents, stage.key)
    events: list[Event] = []
    path = distill.distill(run, preparation(stage, events), make_accelerator("fp32"), events.append, "again")
    assert any(isinstance(e, Stage) and e.title.endswith("300 images, 90 with a label") for e in events)
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["labels"] < 5 for line in lines)
    student, record = load_student(path)
    torch.testing.assert_close(student.class_vectors, load_teacher(stage.file).class_vectors)
    assert record.metrics["test_images"] == 60
    both = ("zero-shot", "few-shot")
    bench = Bench(torch.device("cpu"), tmp_path, lambda event: None, protocols=both, shots=(1,), seeds=(1,))
    records = evaluate(str(path), tmp_path, bench).records
    teacher = next(r for r in records if r.role == "teacher" and r.protocol == "zero-shot")
    assert teacher.top1_percent == pytest.approx(load_teacher(stage.file).record.metrics["test_top1_percent"])
    assert {r.method for r in records} == {"clip", "linear-probe", "tip-adapter", "tip-adapter-f"}
    exported = export(path, tmp_path / "bundle", tmp_path, lambda event: None, options=ExportOptions(check_images=32))
    assert exported.manifest["classes"] == 10
    with pytest.raises(ExportError, match="fitted to labelled images"):
        export(path, tmp_path / "text", tmp_path, lambda event: None, options=ExportOptions(text=True))


@pytest.mark.slow
def test_the_loss_of_a_batch_is_the_cross_entropy_of_its_labelled_images(
    done: tuple[adapt.Stage1, list[Event]], pictures: Path, weights: Path
) -> None:
    loss = {"refinement": None, "if_align": None, "edu_attention": None, "labels": {"weight": 2.0}}
    stage = make_stage(pictures, weights, done[0].runs, loss=loss)
    recipe, source, teacher = stage.recipe, stage.source, preparation(done[0], []).prepare()
    tower = build_image_tower(recipe.student, 1)
    student = distill.build_student(recipe, tower, teacher.teacher.class_vectors, teacher.teacher.logit_scale).train()
    scorer = Scorer(source, torch.device("cpu"), 0, lambda event: None, 0.0)
    objective = distill.Distillation(recipe, student, CachedTeacher(teacher.teacher, None), scorer, tower.preprocessing)
    loader = TrainingLoader(
        source.train, [teacher.preprocessing, tower.preprocessing], Crops(recipe.augment, 1), Steps(20, 1), 0
    )
    digits = torch.tensor(digits_source().train.labels)
    labelled = 0
    for (batch,) in loader.epoch(0):
        known = torch.nonzero(batch.indices < LABELLED).flatten()
        labelled += len(known)
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(digits[i]) if i < LABELLED else -1 for i in batch.indices]
        found = objective.loss(student, batch, probe=False).loss
        expected = 2 * cross_entropy(student(batch.inputs[1]).logits[known], digits[batch.indices[known]])
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        weight = student.projector[0].weight  # type: ignore[index]
        gradients = [torch.autograd.grad(value, weight)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert labelled == LABELLED


@pytest.mark.parametrize("method", ["full", "promptsrc"])
def test_other_teachers_are_adapted_on_the_labelled_images_alone(
    pictures: Path, weights: Path, tmp_path: Path, method: str
) -> None:
    stage = make_stage(pictures, weights, tmp_path, adapt={"method": method, "epochs": 1, "batch_size": 10})
    assert (len(stage.source.train), len(stage.adaptation_source.train)) == (IMAGES, LABELLED)
    assert adapt.describe_stage(stage).endswith("1 epochs of 9 steps on scans")
    labels = stage.adaptation_source.train.labels
    assert labels == digits_source().train.labels[:LABELLED]  # type: ignore[index]


def test_the_plan_names_the_labels_and_refuses_too_few(pictures: Path, weights: Path, tmp_path: Path) -> None:
    stage = make_stage(pictures, weights, tmp_path)
    assert adapt.describe_stage(stage) == "linear_probe: 3 strengths, on 90 labelled images of scans"
    train = stage.source.train
    few = [next(i for i in range(LABELLED) if (train.labels or ())[i] == label) for label in range(10)]
    few.append(next(i for i in range(LABELLED) if (train.labels or ())[i] == 0 and i not in few))
    less = replace(stage, adaptation_source=replace(stage.source, train=train.subset(few)))
    with pytest.raises(DataError) as caught:
        adapt.describe_stage(less)
    assert (caught.value.field, caught.value.found) == ("teacher.adapt", "1 such classes")
    with pytest.raises(DataError):
        preparation(less, []).prepare()
    assert not less.file.exists()


@pytest.mark.slow
def test_zero_shot_vectors_are_kept_where_no_strength_is_better(pictures: Path, weights: Path, tmp_path: Path) -> None:
    stage = make_stage(pictures, weights, tmp_path, adapt={**PROBE, "strengths": [1e9]})
    events: list[Event] = []
    ready = preparation(stage, events).prepare()
    clip = build_clip(stage.settings)
    vectors = encode_prompts(clip, stage.source.class_names, stage.source.template, torch.device("cpu"))
    torch.testing.assert_close(ready.teacher.class_vectors, vectors)
    torch.testing.assert_close(ready.teacher.logit_scale, clip.model.logit_scale.exp().detach())  # type: ignore[operator]
    assert load_teacher(stage.file).record.metrics["zero_shot_kept"] == 1.0
    assert any("zero-shot class vectors are kept" in event.text for event in events if isinstance(event, Notice))


@pytest.mark.slow
def test_a_probe_on_other_weights_is_refused(pictures: Path, weights: Path, tmp_path: Path) -> None:
    moved = tmp_path / "clip.pt"
    moved.write_bytes(weights.read_bytes())
    stage = make_stage(pictures, moved, tmp_path)
    preparation(stage, []).prepare()
    torch.save(build_clip(stage.settings.model_copy(update={"weights": None}), seed=4).model.state_dict(), moved)
    with pytest.raises(CheckpointError, match="adapted on different weights") as caught:
        load_saved_teacher(stage.file, stage.source.class_names, torch.device("cpu"))
    assert caught.value.path == stage.file
