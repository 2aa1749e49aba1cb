import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comkd_cli.data.digits import digits_source
from comkd_cli.data.source import ImageSet
from comkd_cli.events import Event, Notice
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.flows.report import RunCollector, trained_on
from comkd_cli.models.checkpoints import load_student
from comkd_cli.models.costs import multiply_adds
from comkd_cli.recipe.model import Data
from comkd_cli.report.details import PICTURES, Making
from comkd_cli.results.records import Record, Results
from tests import warm


def collected(student: Path, data: Data | None = None, datasets: tuple[str, ...] = ()) -> tuple[RunCollector, Results]:
    events: list[Event] = []
    collector = RunCollector(events.append)
    bench = Bench(torch.device("cpu"), Path("data"), collector.report, data=data, on_scored=collector.observe)
    return collector, evaluate(str(student), Path("runs"), replace(bench, datasets=datasets), collector.closing())


def values(page: str, name: str) -> list[float]:
    """The exact values that a page shows under a field's name, in its order."""
    return [float(value) for value in re.findall(rf'<data value="([^"]+)" title="{name}:', page)]


@pytest.mark.slow
def test_the_figures_are_those_of_the_records_to_the_last_digit(tiny_student: Path, tmp_path: Path) -> None:
    collector, results = collected(tiny_student)
    collector.write(tmp_path / "report.html", Making("comkd report x", Path("runs"), Path("data")))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    student, teacher = results.records
    for name in ("top1_percent", "mean_per_class_percent", "image_tower_parameters"):
        expected = [getattr(student, name), getattr(teacher, name)]
        assert values(page, name)[-2:] == expected
    assert set(values(page, "agreement_percent")) == {student.agreement_percent}
    for record in (student, teacher):
        assert str(record.model_sha256) in page
    assert str(student.images_sha256) in page


def test_costs_are_those_of_the_models_that_were_scored(tiny_student: Path) -> None:
    collector, _ = collected(tiny_student)
    (run,) = collector.runs
    student, _ = load_student(tiny_student)
    assert run.student.multiply_adds == multiply_adds(student, 16)
    assert run.teacher is not None
    assert run.teacher.multiply_adds is not None
    assert run.teacher.multiply_adds > run.student.multiply_adds


@pytest.mark.slow
def test_only_the_images_that_are_shown_are_opened(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector, _ = collected(tiny_student)
    opened: list[int] = []
    own = ImageSet.open

    def counted(self: ImageSet, index: int) -> object:
        opened.append(index)
        return own(self, index)

    monkeypatch.setattr(ImageSet, "open", counted)
    collector.write(tmp_path / "report.html", Making("x", tmp_path, tmp_path))
    assert len(opened) == 2 * PICTURES


@pytest.mark.slow
def test_unlabelled_images_give_agreement_and_a_broken_one_is_counted(tiny_student: Path, tmp_path: Path) -> None:
    for index in range(12):
        digits_source().train.open(index).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no")
    data = Data(folder=str(tmp_path), classes=tuple(str(digit) for digit in range(10)))
    collector, results = collected(tiny_student, data)
    (run,) = collector.runs
    collector.write(tmp_path / "report.html", Making("x", tmp_path, tmp_path))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert run.agreement is not None
    assert run.agreement[0] == results.records[0].agreement_percent
    assert set(values(page, "agreement_percent")) == {results.records[0].agreement_percent}
    assert values(page, "top1_percent") == []
    assert "could not be read and are not scored: 1." in page
    assert "was trained on the images" not in page  # it was trained on others


def test_a_student_without_its_teacher_has_a_report_that_says_why(tiny_student: Path, tmp_path: Path) -> None:
    moved = tmp_path / "student.pt"
    shutil.copy(tiny_student, moved)
    collector, _ = collected(moved)
    (run,) = collector.runs
    assert run.teacher is None
    collector.write(tmp_path / "report.html", Making("x", tmp_path, tmp_path))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the teacher could not be scored" in page
    assert "disagree most" not in page


def test_the_notices_of_a_run_are_not_those_of_the_next(tiny_student: Path) -> None:
    events: list[Event] = []
    collector = RunCollector(events.append)
    bench = Bench(torch.device("cpu"), Path("data"), collector.report, on_scored=collector.observe)
    evaluate(str(tiny_student), Path("runs"), bench, collector.closing())
    collector.report(Notice("of the next run"))
    evaluate(str(tiny_student), Path("runs"), bench, collector.closing())
    first, second = collector.runs
    assert "of the next run" not in first.notices
    assert "of the next run" in second.notices
    assert Notice("of the next run") in events


def test_images_of_the_training_are_recognised_by_their_digest() -> None:
    source = digits_source()
    assert source.test is not None
    assert not trained_on(source.train.digest, source, source.test)
    assert trained_on(source.test.digest, source, source.test)  # as on ImageNet's variants
    unlabelled = replace(source, test=None)
    some = source.train.subset([0, 5])  # of many images only some are compared
    assert trained_on(source.train.digest, unlabelled, some)
    assert not trained_on("other", unlabelled, some)
    assert not trained_on(None, unlabelled, some)


def test_results_without_a_student_make_no_run() -> None:
    collector = RunCollector(lambda event: None)
    kept: list[Results] = []
    record = Record("ViT", "baseline", "digits", 1.0, 1.0, 1, 1)
    collector.closing(kept.append)(Results([record]))
    assert collector.runs == []
    assert len(kept) == 1


@pytest.mark.slow
def test_evaluate_and_report_leave_the_page_beside_the_student(tiny_student: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_student.parents[3], runs)
    student = runs / tiny_student.relative_to(tiny_student.parents[3])
    scored = warm.run("evaluate", student, "--runs", runs, cwd=tmp_path, digits=None, figures=True)
    assert scored.returncode == 0, scored.stderr
    page = (student.parent / "report.html").read_text(encoding="utf-8")
    records = json.loads((student.parent / "results.json").read_text())["records"]
    assert values(page, "top1_percent")[-2:] == [record["top1_percent"] for record in records]
    again = warm.run(
        "report", student.parent, student, "--runs", runs, "--out", "both.html", cwd=tmp_path, digits=None, figures=True
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.split() == ["report:", "both.html"]
    assert "2 runs compared" in (tmp_path / "both.html").read_text(encoding="utf-8")
    refused = warm.run("report", runs / "tiny", cwd=tmp_path)
    assert refused.returncode == 1
    assert str(student.parent) in refused.stderr
