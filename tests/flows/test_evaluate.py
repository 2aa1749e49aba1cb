import copy
import hashlib
import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from comkd_cli.data.batches import ScoringItems
from comkd_cli.data.digits import digits_source
from comkd_cli.edge.images import prepare
from comkd_cli.errors import CheckpointError, ComkdError, DataError, ModelError
from comkd_cli.evaluation.scoring import DatasetScorer, Scores
from comkd_cli.evaluation.subjects import Subject
from comkd_cli.events import Event, Notice
from comkd_cli.flows import evaluate as flow
from comkd_cli.flows.evaluate import Bench, evaluate, home_of
from comkd_cli.models.checkpoints import load_student
from comkd_cli.models.finished import newest_students, timeout_minutes
from comkd_cli.recipe.model import Data
from comkd_cli.results.records import Results
from comkd_cli.runtime import collectives
from tests import tiny


def bench(events: list[Event] | None = None, data: Data | None = None) -> Bench:
    report = (events if events is not None else []).append
    return Bench(torch.device("cpu"), Path("data"), report, data=data)


def test_student_and_teacher_are_scored_as_scikit_learn_scores_them(tiny_student: Path) -> None:
    student_record, teacher_record = evaluate(str(tiny_student), Path("runs"), bench()).records
    student, record = load_student(tiny_student)
    test = digits_source().test
    assert test is not None
    images = np.stack([prepare(test.open(i), record.preprocessing) for i in range(len(test))])
    with torch.no_grad():
        predicted = student(torch.from_numpy(images)).logits.argmax(1).numpy()
    assert student_record.top1_percent == pytest.approx(100 * accuracy_score(test.labels, predicted))
    assert student_record.mean_per_class_percent == pytest.approx(100 * balanced_accuracy_score(test.labels, predicted))
    assert (student_record.role, teacher_record.role) == ("student", "teacher")
    assert student_record.images == teacher_record.images == 360
    assert student_record.image_tower_parameters == sum(p.numel() for p in student.parameters())
    assert student_record.top1_percent == pytest.approx(record.metrics["test_top1_percent"])
    assert student_record.agreement_percent is not None


def test_students_of_several_seeds_and_their_teacher_decode_each_image_once(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_student.parents[3], runs)
    home = runs / tiny_student.relative_to(tiny_student.parents[3]).parent
    shutil.copytree(home, home.parent / "seed9")
    other = torch.load(home.parent / "seed9/student.pt", weights_only=True)
    other["metrics"]["test_top1_percent"] = 0.0  # so that it is another file, with features of its own
    torch.save(other, home.parent / "seed9/student.pt")
    decoded: list[int] = []
    item = ScoringItems.__getitem__
    monkeypatch.setattr(
        ScoringItems, "__getitem__", lambda items, index: (decoded.append(index), item(items, index))[1]
    )
    records = evaluate(None, runs, replace(bench(), features=tmp_path / "features")).records
    assert [record.role for record in records].count("student") == 2
    assert len(decoded) == 360
    assert len(list((tmp_path / "features").iterdir())) == 3


def test_a_student_without_its_teacher_is_scored_alone(tiny_student: Path, tmp_path: Path) -> None:
    moved = tmp_path / "student.pt"
    shutil.copy(tiny_student, moved)
    events: list[Event] = []
    (record,) = evaluate(str(moved), Path("runs"), bench(events)).records
    assert record.role == "student"
    assert any(isinstance(event, Notice) and "the teacher could not be scored" in event.text for event in events)


def test_a_teacher_that_was_trained_again_is_not_scored_as_the_teacher(tiny_student: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_student.parents[3], runs)
    student = runs / tiny_student.relative_to(tiny_student.parents[3])
    (teacher,) = runs.glob("teachers/*/teacher.pt")
    saved = torch.load(teacher, weights_only=True)
    saved["state_dict"]["visual.proj"] += 1
    torch.save(saved, teacher)
    events: list[Event] = []
    (record,) = evaluate(str(student), runs, bench(events)).records
    assert record.role == "student"
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert str(teacher) in notice
    assert "sha256" in notice


def test_unlabelled_images_give_agreement_alone(tiny_student: Path, tmp_path: Path) -> None:
    for index in range(12):
        digits_source().train.open(index).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no")
    data = Data(folder=str(tmp_path), classes=tuple(str(digit) for digit in range(10)))
    events: list[Event] = []
    student_record, _ = evaluate(str(tiny_student), Path("runs"), bench(events, data)).records
    assert student_record.top1_percent is None
    assert student_record.agreement_percent is not None
    assert (student_record.images, student_record.unreadable) == (12, 1)
    assert any(isinstance(event, Notice) and "broken.png" in event.text for event in events)


def test_classes_that_the_student_does_not_know_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    digits_source().train.open(0).save(tmp_path / "0.png")
    data = Data(folder=str(tmp_path), classes=("zero", "one"))
    with pytest.raises(DataError, match="does not know zero, one") as caught:
        evaluate(str(tiny_student), Path("runs"), bench(data=data))
    assert "the student's classes" in str(caught.value.remedy)


@pytest.mark.slow
def test_a_student_whose_names_have_underscores_is_scored_with_its_own_prompts(
    tiny_student: Path, tmp_path: Path
) -> None:
    expected = evaluate(str(tiny_student), Path("runs"), bench()).records
    runs = tiny_student.parents[3]
    shutil.copytree(runs, tmp_path / "runs")
    for path in (tmp_path / "runs").rglob("*.pt"):  # as a version stored them that kept a class list's spelling
        stored = torch.load(path, weights_only=True)
        stored.pop("teacher_sha256", None)  # which that version did not record
        torch.save({**stored, "class_names": [f"digit_{name}" for name in stored["class_names"]]}, path)
    source = digits_source()
    assert source.test is not None
    for index, label in enumerate(source.test.labels or ()):
        folder = tmp_path / "digits/test" / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        source.test.open(index).save(folder / f"{index}.png")
    data = Data(folder=str(tmp_path / "digits"), template="{}")
    events: list[Event] = []
    student = tmp_path / "runs" / tiny_student.relative_to(runs)
    found = evaluate(str(student), tmp_path / "runs", bench(events, data)).records
    assert [(r.role, r.top1_percent, r.agreement_percent) for r in found] == [
        (r.role, pytest.approx(r.top1_percent), r.agreement_percent and pytest.approx(r.agreement_percent))
        for r in expected
    ]


@pytest.mark.slow
def test_notices_about_a_dataset_are_reported_once_for_all_its_students(tiny_student: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_student.parents[3], tmp_path / "runs")
    home = tmp_path / "runs" / tiny_student.relative_to(tiny_student.parents[3]).parent
    shutil.copytree(home, home.parent / "seed9")
    for digit in range(10):
        (tmp_path / f"digits/test/{digit}").mkdir(parents=True)
    digits_source().train.open(0).save(tmp_path / f"digits/test/{digits_source().train.labels[0]}/0.png")  # type: ignore[index]
    (tmp_path / "digits/test/0/note.txt").write_text("x")
    events: list[Event] = []
    evaluate(None, tmp_path / "runs", bench(events, Data(folder=str(tmp_path / "digits"))))
    texts = [event.text for event in events if isinstance(event, Notice)]
    assert len([text for text in texts if "1 file of another type is skipped: 1 .txt" in text]) == 1
    assert len([text for text in texts if "no test images of: " in text]) == 1


def test_without_a_model_the_newest_student_of_each_dataset_is_scored(tiny_student: Path) -> None:
    runs = tiny_student.parents[3]
    assert newest_students(runs) == {"digits": [tiny_student]}
    assert next(record.model for record in evaluate(None, runs, bench()).records) == str(tiny_student)


def test_without_any_student_the_remedy_is_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(None, tmp_path, bench())
    assert caught.value.path == tmp_path
    assert "comkd distill digits" in str(caught.value.remedy)


def test_a_plain_clip_from_a_local_file_is_scored_as_open_clip_scores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory: Any = importlib.import_module("open_clip.factory")
    for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(factory, name, copy.copy(getattr(factory, name)))
    (tmp_path / "Tiny.json").write_text(json.dumps(tiny.CLIP))
    open_clip.add_model_config(tmp_path / "Tiny.json")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("Tiny")
    weights = tmp_path / "clip.pt"
    torch.save(model.state_dict(), weights)
    source = digits_source()
    for index in range(6):
        folder = tmp_path / "six" / "test" / source.class_names[source.train.labels[index]]  # type: ignore[index]
        folder.mkdir(parents=True, exist_ok=True)
        source.train.open(index).save(folder / f"{index}.png")
    data = Data(folder=str(tmp_path / "six"), classes=source.class_names, template="a {}!")
    (record,) = evaluate(f"Tiny:{weights}", Path("runs"), bench(data=data)).records
    model.eval()
    text = model.encode_text(open_clip.get_tokenizer("Tiny")([f"a {name}!" for name in source.class_names]))
    images = torch.stack([transform(source.train.open(index)) for index in range(6)])
    with torch.no_grad():
        similarity = torch.nn.functional.normalize(model.encode_image(images), dim=1) @ text.T / text.norm(dim=1)
    correct = similarity.argmax(1) == torch.tensor(source.train.labels[:6])  # type: ignore[index]
    assert record.top1_percent == pytest.approx(100 * correct.float().mean().item())
    assert (record.role, record.images) == ("baseline", 6)


@pytest.mark.parametrize(
    ("model", "error", "found", "remedy"),
    [
        ("nowhere/student.pt", CheckpointError, None, None),
        ("ViT-B-32", ModelError, None, "use one of these, such as ViT-B-32:laion2b_s34b_b79k"),
        ("ViT-B-32:openai", ModelError, "ViT-B-32", "use ViT-B-32-quickgelu"),
        ("ViT-B-32:nothing", ModelError, "nothing", None),
    ],
)
def test_a_model_that_does_not_exist_is_explained(
    model: str, error: type[ComkdError], found: str | None, remedy: str | None
) -> None:
    with pytest.raises(error) as caught:
        evaluate(model, Path("runs"), bench(data=Data(dataset="digits")))
    assert (caught.value.found, caught.value.remedy) == (found, remedy)


def test_tags_of_the_architecture_are_allowed_instead_of_an_unknown_one() -> None:
    with pytest.raises(ModelError) as caught:
        evaluate("ViT-B-32:nothing", Path("runs"), bench(data=Data(dataset="digits")))
    assert caught.value.field == "weights"
    assert caught.value.allowed == open_clip.list_pretrained_tags_by_model("ViT-B-32")


def test_one_student_that_fails_is_a_row_and_scores_are_passed_on_at_once(tiny_student: Path, tmp_path: Path) -> None:
    own = tmp_path / "tiny/digits/seed1"
    shutil.copytree(tiny_student.parent, own)
    broken = tmp_path / "other/letters/seed1/student.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no student")
    kept: list[Results] = []
    results = evaluate(None, tmp_path, bench(), kept.append)
    assert {record.model for record in results.records} == {str(own / "student.pt")}
    (missing,) = results.missing
    assert (missing.dataset, missing.model, missing.failed) == ("letters", str(broken), True)
    assert [(len(part.records), len(part.missing)) for part in kept] == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    "error",
    [
        ModelError("no such model"),
        OSError(13, "Permission denied", "x.pt"),
        MemoryError(),
        RuntimeError("out of memory"),
    ],
)
def test_whatever_error_one_model_raises_the_others_are_scored(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for seed in (1, 2):
        shutil.copytree(tiny_student.parent, tmp_path / f"tiny/digits/seed{seed}")
    load = flow.load_student

    def failing(path: Path, *more: object) -> object:
        if "seed1" in str(path):
            raise error
        return load(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(flow, "load_student", failing)
    results = evaluate(None, tmp_path, bench())
    assert [record.model for record in results.records] == [str(tmp_path / "tiny/digits/seed2/student.pt")]
    assert [entry.failed for entry in results.missing] == [True]


def test_a_bug_is_not_a_row(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(path: Path, *more: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(flow, "load_student", buggy)
    with pytest.raises(ZeroDivisionError):
        evaluate(str(tiny_student), Path("runs"), bench())


def test_a_teacher_that_fails_leaves_the_students_scores(tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = DatasetScorer.score

    def failing(self: DatasetScorer, subject: Subject) -> Scores:
        if subject.role == "teacher":
            raise RuntimeError("[enforce fail] can't allocate memory: 9 bytes")
        return score(self, subject)

    monkeypatch.setattr(DatasetScorer, "score", failing)
    results = evaluate(str(tiny_student), Path("runs"), bench())
    assert [record.role for record in results.records] == ["student"]
    assert "more memory" in results.missing[0].problem


def test_a_student_is_scored_on_the_named_datasets(tiny_student: Path, tmp_path: Path) -> None:
    named = replace(bench(), datasets=("digits", "dtd"), data_root=tmp_path)
    results = evaluate(str(tiny_student), tmp_path, named)
    assert {record.dataset for record in results.records} == {"digits"}
    (missing,) = results.missing
    assert (missing.dataset, missing.failed) == ("dtd", False)


def test_records_have_the_digest_of_the_weights(tiny_student: Path) -> None:
    student, teacher = evaluate(str(tiny_student), Path("runs"), bench()).records
    assert student.model_sha256 == hashlib.sha256(tiny_student.read_bytes()).hexdigest()
    assert teacher.model_sha256 not in (None, student.model_sha256)


def test_seeds_of_other_settings_are_reported(tiny_student: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        shutil.copytree(tiny_student.parent, tmp_path / f"tiny/digits/seed{seed}")
    events: list[Event] = []
    evaluate(None, tmp_path, bench(events))
    assert not any("different settings" in str(event) for event in events)
    path = tmp_path / "tiny/digits/seed2/student.pt"
    data = torch.load(path, weights_only=True)
    data["recipe"] |= {"seed": 2, "about": "the same student", "evaluate_every_epochs": 2, "checkpointing": True}
    torch.save(data, path)
    evaluate(None, tmp_path, bench(events))
    assert not any("different settings" in str(event) for event in events)
    data["recipe"]["optim"]["epochs"] = 7
    torch.save(data, path)
    evaluate(None, tmp_path, bench(events))
    notices = [event.text for event in events if isinstance(event, Notice) and "different settings" in event.text]
    assert len(notices) == 1
    assert "optim.epochs" in notices[0]
    assert "evaluate_every_epochs" not in notices[0]


def test_a_chosen_protocol_that_does_not_apply_is_a_notice(tiny_student: Path) -> None:
    events: list[Event] = []
    protocols = ("zero-shot", "domain-generalization")
    named = replace(bench(events), protocols=protocols, protocols_named=True)
    assert evaluate(str(tiny_student), Path("runs"), named).records
    assert any("domain-generalization does not apply" in str(event) for event in events)
    by_default = replace(bench(events := []), protocols=protocols)
    assert evaluate(str(tiny_student), Path("runs"), by_default).records
    assert not any("does not apply" in str(event) for event in events)


def test_results_are_written_to_the_folder_of_the_student_or_of_the_runs(tiny_student: Path) -> None:
    assert home_of(str(tiny_student), Path("runs"), own_data=True) == tiny_student.parent
    assert home_of(str(tiny_student), Path("runs"), own_data=False) == Path("runs")
    assert home_of("ViT-B-32:openai", Path("runs"), own_data=False) == Path("runs")


def test_several_processes_wait_as_long_as_the_recipes_of_the_students_say(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = collectives.DEFAULT_TIMEOUT_MINUTES
    for seed, minutes in ((1, default / 10), (2, default * 3)):
        folder = tmp_path / f"tiny/digits/seed{seed}"
        shutil.copytree(tiny_student.parent, folder)
        data = torch.load(folder / "student.pt", weights_only=True)
        data["recipe"]["collective_timeout_minutes"] = minutes
        torch.save(data, folder / "student.pt")
    (tmp_path / "tiny/digits/seed3").mkdir()
    (tmp_path / "tiny/digits/seed3/student.pt").write_bytes(b"damaged")
    first = str(tmp_path / "tiny/digits/seed1/student.pt")
    assert timeout_minutes(first, tmp_path) == default  # a single process waits for none
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert timeout_minutes(first, tmp_path) == pytest.approx(default / 10)
    assert timeout_minutes(None, tmp_path) == pytest.approx(default * 3)
    assert timeout_minutes("ViT-B-32:openai", tmp_path) == default
