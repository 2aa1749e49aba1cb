"""Runs on folders without a test split: held-out images are measured on and never learned from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.bundles.gates import GATES, Gate
from comkd_cli.data.digits import digits_source
from comkd_cli.data.source import ImageSet
from comkd_cli.data.sources import open_source
from comkd_cli.errors import CheckpointError
from comkd_cli.events import Epoch, Event, Notice
from comkd_cli.flows import adapt, distill
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.flows.export import ExportOptions, export
from comkd_cli.models.checkpoints import load_student_record
from comkd_cli.recipe import parse_recipe
from comkd_cli.results.records import Record
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

FULL = {"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 1, "batch_size": 16}}
OPTIM = {**tiny.OPTIM, "epochs": 1, "batch_size": 16}


def write_digits(folder: Path, labelled: bool) -> Path:
    """Some digits, in train/ with a sub-folder for each class, or without labels."""
    digits = digits_source().train
    for index in range(90):
        path = folder / (f"train/{(digits.labels or ())[index]}" if labelled else "deep")
        path.mkdir(parents=True, exist_ok=True)
        digits.open(index).save(path / f"{index}.png")
    return folder


def prepare(data: dict[str, Any], runs: Path, teacher: dict[str, Any]) -> tuple[distill.Run, adapt.Stage1]:
    data = {"classes": [str(digit) for digit in range(10)], "workers": 0, **data}
    recipe = parse_recipe(tiny.recipe(data=data, teacher=teacher, optim=OPTIM))
    source = open_source(recipe.data, Path("data"), runs)
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    return distill.Run(recipe, "it", source, runs, stage.contents, stage.key), stage


def train(run: distill.Run, stage: adapt.Stage1, events: list[Event] | None = None) -> Path:
    report = (events if events is not None else []).append
    accelerator = make_accelerator("fp32")
    return distill.distill(
        run, adapt.TeacherPreparation(stage, accelerator, report, "again"), accelerator, report, "again"
    )


def scored(run: distill.Run, events: list[Event] | None = None) -> Sequence[Record]:
    report = (events if events is not None else []).append
    bench = Bench(torch.device("cpu"), Path("data"), report, runs=run.runs)
    return evaluate(str(run.student_file), run.runs, bench).records


def texts(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[distill.Run, list[str], list[Event]]:
    """A finished run on labelled images, the images that its training opened, and its events."""
    home = tmp_path_factory.mktemp("labelled")
    opened: list[str] = []
    open_image = ImageSet.open

    def noted(self: ImageSet, index: int) -> Any:
        opened.append(self.keys[index])
        return open_image(self, index)

    events: list[Event] = []
    run, stage = prepare({"folder": str(write_digits(home / "digits2", True)), "classes": None}, home / "runs", FULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comkd_cli.data.source.ImageSet.open", noted)
        patch.setattr("comkd_cli.flows.distill.stage_2.Scorer.__call__", lambda *_: {})
        patch.setattr("comkd_cli.flows.adapt.adaptation.Adaptation.evaluate", lambda _: {})
        train(*prepare({"folder": str(home / "digits2"), "classes": None}, home / "unscored", FULL))
    train(run, stage, events)
    return run, opened, events


def test_no_held_out_image_is_opened_by_a_training_that_scores_nothing(
    labelled: tuple[distill.Run, list[str], list[Event]],
) -> None:
    run, opened, _ = labelled
    assert run.source.test is not None
    assert set(opened) == set(run.source.train.keys)
    assert not set(opened) & set(run.source.test.keys)
    assert len(run.source.train) + len(run.source.test) == 90


@pytest.mark.slow
def test_training_evaluation_and_export_give_the_same_score_on_the_same_held_out_images(
    labelled: tuple[distill.Run, list[str], list[Event]], tmp_path: Path
) -> None:
    run, _, events = labelled
    record = load_student_record(run.student_file)
    assert record.holdout == run.source.holdout
    student, teacher = scored(run)
    assert run.source.test is not None
    assert (student.images, student.images_from) == (len(run.source.test), "held-out")
    assert student.top1_percent == record.metrics["test_top1_percent"]
    assert student.agreement_percent == record.metrics["test_agreement_percent"]
    assert teacher.top1_percent is not None
    epochs = [event for event in events if isinstance(event, Epoch)]
    assert epochs
    assert all(event.held_out for event in epochs)
    options = ExportOptions(runs=run.runs, gates=dict.fromkeys(GATES, Gate(-1, 0, 100)))
    manifest = export(run.student_file, tmp_path / "bundle", Path("data"), lambda event: None, options=options).manifest
    gate = manifest["images"]["gate"]
    assert (gate["images"], gate["origin"], gate["held_out"]) == (len(run.source.test), "test", True)
    assert manifest["test_top1_changed"] is None
    assert f"Top-1 on {gate['images']} held-out images" in (tmp_path / "bundle/README.md").read_text()


def test_the_teacher_was_looked_at_before_the_student_and_the_file_says_what_was_found(
    labelled: tuple[distill.Run, list[str], list[Event]],
) -> None:
    run, _, events = labelled
    found = json.loads((run.folder / "teacher_check.json").read_text())
    assert (found["images"], found["classes"]) == (len(run.source.train), 10)
    lines = [event.text for event in events if isinstance(event, Notice)]
    assert any(line.startswith(f"the teacher on {found['images']} training images") for line in lines)
    for finding in found["findings"]:
        assert f"{finding['text']}; {finding['remedy']}" in lines


@pytest.mark.slow
def test_unlabelled_images_have_an_agreement_while_training(tmp_path: Path, weights: Path) -> None:
    teacher = {"config": tiny.CLIP, "weights": str(weights)}
    events: list[Event] = []
    run, stage = prepare({"folder": str(write_digits(tmp_path / "photos", False))}, tmp_path / "runs", teacher)
    train(run, stage, events)
    metrics = load_student_record(run.student_file).metrics
    assert run.source.test is not None
    assert metrics["test_images"] == len(run.source.test)
    assert "test_top1_percent" not in metrics
    student, _ = scored(run, events)
    assert student.agreement_percent == metrics["test_agreement_percent"]
    assert student.teacher_top_answer_percent is not None
    # Random weights: the file's own check and the score must agree on whether it has one answer alone.
    one_answer = student.teacher_top_answer_percent >= 90
    assert ("teacher_top_answer_percent" in metrics) is one_answer
    assert ("says little" in texts(events)) is one_answer


def without_field(student_file: Path) -> None:
    """Rewrite a student.pt as a version without held-out images wrote it."""
    data = torch.load(student_file, weights_only=True)
    del data["recipe"]["data"]["holdout_percent"], data["identity_parts"]["recipe"]["data"]["holdout_percent"]
    del data["holdout"]
    torch.save(data, student_file)


@pytest.mark.slow
def test_a_student_of_a_version_without_the_field_was_trained_on_every_image(tmp_path: Path, weights: Path) -> None:
    teacher = {"config": tiny.CLIP, "weights": str(weights)}
    folder = {"folder": str(write_digits(tmp_path / "photos", True)), "classes": None}
    run, stage = prepare({**folder, "holdout_percent": 0}, tmp_path / "runs", teacher)
    train(run, stage)
    without_field(run.student_file)
    record = load_student_record(run.student_file)
    assert (record.recipe.data.holdout_percent, record.holdout) == (0, None)
    events: list[Event] = []
    student, _ = scored(run, events)
    assert (student.images, student.images_from, student.top1_percent) == (90, "training", None)
    assert "not held out" in texts(events)
    assert distill.finished(run)
    with pytest.raises(CheckpointError) as caught:
        distill.finished(prepare(folder, tmp_path / "runs", teacher)[0])
    assert caught.value.found == "data.holdout_percent: 0 in the finished run, 10 now"


def test_a_teacher_of_other_data_is_not_trained_on_copies_of_held_out_images(tmp_path: Path, weights: Path) -> None:
    write_digits(tmp_path / "photos", False)
    write_digits(tmp_path / "labelled", True)
    adapts = {"method": "promptsrc", "data": {"folder": str(tmp_path / "labelled"), "holdout_percent": 0}}
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": {**adapts, "shots": None}}
    run, stage = prepare({"folder": str(tmp_path / "photos")}, tmp_path / "runs", teacher)
    assert run.source.test is not None
    names = {Path(key).name for key in run.source.test.keys}
    learned = {Path(key).name for key in stage.adaptation_source.train.keys}
    assert names
    assert not names & learned
    assert len(names | learned) == 90


def test_a_dry_run_looks_at_a_teacher_whose_weights_are_there(tmp_path: Path, weights: Path) -> None:
    data = {"folder": str(write_digits(tmp_path / "photos", True)), "classes": None}
    run, _ = prepare(data, tmp_path / "runs", {"config": tiny.CLIP, "weights": str(weights)})
    found = distill.preview_teacher(run, None, "cpu", lambda event: None)
    assert not isinstance(found, str)
    assert (found.images, found.classes) == (len(run.source.train), 10)
    assert not run.folder.exists()
    assert "not trained yet" in str(distill.preview_teacher(run, tmp_path / "teacher.pt", "cpu", lambda event: None))
    absent, _ = prepare(data, tmp_path / "runs", {"arch": "ViT-B-32-quickgelu", "weights": "openai"})
    assert "not on this machine" in str(distill.preview_teacher(absent, None, "cpu", lambda event: None))


@pytest.mark.slow
def test_test_images_that_are_training_images_are_counted(tmp_path: Path, weights: Path) -> None:
    folder = write_digits(tmp_path / "photos", True)
    for name in ("0", "1"):
        (folder / "test" / name).mkdir(parents=True)
    for digit in range(2, 10):
        (folder / "test" / str(digit)).mkdir()
    copied = sorted((folder / "train/0").iterdir())[0]
    (folder / "test/0/copy.png").write_bytes(copied.read_bytes())
    digits_source().train.open(200).save(folder / "test/1/other.png")
    run, stage = prepare({"folder": str(folder), "classes": None}, tmp_path / "runs", FULL)
    events: list[Event] = []
    train(run, stage, events)
    assert "1 of 2 test images have the same content as training images" in texts(events)
