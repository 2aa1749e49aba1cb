import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.data.source import Source
from comkd_cli.data.sources import open_source
from comkd_cli.errors import CheckpointError, DataError, ModelError
from comkd_cli.events import Event, Notice, Stage
from comkd_cli.files import sha256_of_file
from comkd_cli.flows import adapt, distill
from comkd_cli.flows.adapt.adaptation import FullAdaptation
from comkd_cli.models.backbones import build_clip
from comkd_cli.models.checkpoints import load_student
from comkd_cli.models.costs import multiply_adds
from comkd_cli.recipe import Recipe, parse_recipe, read_yaml
from comkd_cli.recipe.model import Model
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

pytestmark = pytest.mark.usefixtures("few_digits")


def make_run(runs: Path, **changes: Any) -> distill.Run:
    chosen = parse_recipe(tiny.recipe(**changes))
    source = open_source(chosen.data, Path("data"))
    teacher = stage(chosen, source, runs)
    return distill.Run(chosen, "tiny", source, runs, teacher.contents, teacher.key)


def stage(recipe: Recipe, source: Source, runs: Path) -> adapt.Stage1:
    return adapt.stage_1(recipe, source, Path("data"), runs)


def do(run: distill.Run, events: list[Event] | None = None, fresh: bool = False) -> Path:
    report = (events if events is not None else []).append
    accelerator = make_accelerator("fp32")
    return distill.distill(
        run,
        adapt.TeacherPreparation(stage(run.recipe, run.source, run.runs), accelerator, report, "again"),
        accelerator,
        report,
        "again",
        fresh,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> distill.Run:
    run = make_run(tmp_path_factory.mktemp("runs"))
    do(run)
    return run


def test_a_run_leaves_student_recipe_and_metrics_and_no_state(done: distill.Run) -> None:
    assert done.folder == done.runs / "tiny" / "digits" / "seed1"
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "metrics.jsonl",
        "recipe.yaml",
        "student.pt",
        "teacher_check.json",
    ]
    resolved = parse_recipe(read_yaml((done.folder / "recipe.yaml").read_text(), "it"))
    assert resolved == done.recipe


def test_metrics_hold_every_term_its_gradient_share_the_gate_and_the_score(done: distill.Run) -> None:
    last = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["refinement"] + last["if_align"], rel=1e-5)
    assert last["refinement_gradient_share"] + last["if_align_gradient_share"] == pytest.approx(1)
    assert {"gate", "test_top1_percent", "learning_rate", "images_per_second"} <= set(last)


def test_student_pt_is_plain_data(done: distill.Run) -> None:
    data = torch.load(done.student_file, weights_only=True)
    assert data["format"] == "comkd-student/1"
    assert data["class_names"] == [str(digit) for digit in range(10)]
    assert data["class_vectors"].shape == (10, 16)
    assert torch.allclose(data["class_vectors"].norm(dim=1), torch.ones(10), atol=1e-6)
    assert (done.folder / data["teacher"]).is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(done: distill.Run, tmp_path: Path) -> None:
    again, other = make_run(tmp_path), make_run(tmp_path, seed=2)
    first, second, third = (
        load_student(do(run) if run is not done else run.student_file)[0] for run in (done, again, other)
    )
    assert all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())
    assert not torch.equal(first.projector[0].weight, third.projector[0].weight)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_teacher_is_trained_once_for_students_of_several_seeds(done: distill.Run) -> None:
    (teacher,) = (done.runs / "teachers").glob("*/teacher.pt")
    written = teacher.stat().st_mtime_ns
    events: list[Event] = []
    do(make_run(done.runs, seed=7), events)
    assert teacher.stat().st_mtime_ns == written
    assert any(isinstance(event, Stage) and "reused" in event.title for event in events)


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {**tiny.recipe()["teacher"], "adapt": {"method": "full", "epochs": 3}}},
        {"data": {"dataset": "digits", "template": "number {}"}},
        {"augment": {"min_scale": 0.5}},
    ],
)
def test_another_teacher_gets_another_folder(done: distill.Run, change: dict[str, Any]) -> None:
    changed = make_run(done.runs, **change)
    folders = {stage(run.recipe, run.source, done.runs).folder for run in (changed, done)}
    assert len(folders) == 2


def test_a_finished_run_is_known_and_another_recipe_in_its_place_refused(done: distill.Run) -> None:
    assert distill.finished(done)
    assert distill.finished(make_run(done.runs, about="other words", evaluate_every_epochs=0))
    changed = make_run(done.runs, optim={**tiny.OPTIM, "epochs": 5})
    with pytest.raises(CheckpointError) as caught:
        distill.finished(changed)
    assert caught.value.path == done.student_file
    assert "--fresh" in str(caught.value.remedy)


@pytest.mark.slow
def test_more_epochs_than_a_finished_run_has_can_start_from_its_student(done: distill.Run, tmp_path: Path) -> None:
    """By the commands of the refusal, as a shell reads them."""
    runs = tmp_path / "the runs"
    shutil.copytree(done.runs, runs)
    longer = {**tiny.OPTIM, "epochs": 3}
    with pytest.raises(CheckpointError) as caught:
        distill.finished(make_run(runs, optim=longer), command="comkd distill it --seed 1")
    lines = [shlex.split(line) for line in str(caught.value.remedy).splitlines() if line.startswith("  ")]
    move, warm, fresh = lines
    assert fresh == ["comkd", "distill", "it", "--seed", "1", "--fresh"]
    assert warm[:6] == ["comkd", "distill", "it", "--seed", "1", "--set"]
    Path(move[1]).rename(move[2])
    field, _, weights = warm[6].partition("=")
    assert field == "student.weights"
    # So low a rate leaves the weights as they started.
    hardly = {**longer, "learning_rate": 1e-12}
    again = make_run(runs, optim=hardly, student={"train": "full", "config": tiny.TOWER, "weights": weights})
    events: list[Event] = []
    student, record = load_student(do(again, events))
    assert any(isinstance(event, Notice) and "tensors start from" in event.text for event in events)
    assert any(isinstance(event, Stage) and event.title.startswith("Teacher: reused from") for event in events)
    assert distill.finished(again)
    old, _ = load_student(Path(weights))
    for ours, theirs in zip(student.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
    assert record.class_names == again.source.class_names
    assert again.identity.parts["student"]["weights_sha256"] == sha256_of_file(Path(weights))
    itself = make_run(runs, student={"train": "full", "config": tiny.TOWER, "weights": str(again.student_file)})
    with pytest.raises(ModelError) as refused:
        do(itself, fresh=True)
    assert refused.value.field == "student.weights"


@pytest.mark.slow
def test_a_student_of_several_prompts_has_the_mean_vectors_and_they_count_in_its_identity(
    tmp_path: Path, weights: Path
) -> None:
    teacher = {"config": tiny.CLIP, "weights": str(weights)}
    optim = {**tiny.OPTIM, "epochs": 1}
    data = {"dataset": "digits", "templates": ["the {}", "number {}."]}
    run = make_run(tmp_path, teacher=teacher, optim=optim, data=data)
    student, record = load_student(do(run))
    clip = build_clip(Model(config=tiny.CLIP, weights=str(weights)))
    with torch.no_grad():
        features = clip.model.encode_text(clip.tokenize(["the 7", "number 7."]))  # type: ignore[operator]
    mean = torch.nn.functional.normalize(features, dim=-1).mean(0)
    torch.testing.assert_close(student.class_vectors[7], mean / mean.norm())
    assert record.prompts.of("7") == ("the 7", "number 7.")
    for other in ({"template": "the {}"}, {"templates": ["the {}", "digit {}"]}):
        changed = make_run(tmp_path, teacher=teacher, optim=optim, data={"dataset": "digits", **other})
        with pytest.raises(CheckpointError) as caught:
            distill.finished(changed)
        assert "data.templates: the {}, number {}. in the finished run" in str(caught.value.found)


def test_a_teacher_trained_in_full_learns_the_first_prompt_alone_and_says_so(done: distill.Run) -> None:
    template = done.source.template
    several = make_run(done.runs, data={"dataset": "digits", "templates": [template, "the {}"]})
    teacher = stage(several.recipe, several.source, done.runs)
    assert teacher.file == stage(done.recipe, done.source, done.runs).file  # shared with a run of that prompt alone
    events: list[Event] = []
    FullAdaptation(teacher, several.recipe.teacher.adapt, torch.device("cpu"), events.append)  # type: ignore[arg-type]
    assert any(isinstance(event, Notice) and "learns only the first prompt" in event.text for event in events)


@pytest.mark.slow
def test_fresh_replaces_the_finished_student(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    do(run)
    written = run.student_file.read_bytes()  # not the inode: the system may give the same one again
    changed = make_run(tmp_path, optim={**tiny.OPTIM, "epochs": 1})
    do(changed, fresh=True)
    assert run.student_file.read_bytes() != written
    assert distill.finished(changed)


@pytest.mark.slow
def test_a_student_of_labels_alone_never_runs_the_teacher(tmp_path: Path, seen: list[int]) -> None:
    events: list[Event] = []
    loss = {"refinement": None, "if_align": None, "labels": {}, "edu_attention": {"gate_start": 0.1}}
    student = do(make_run(tmp_path, loss=loss, teacher_cache={"views": 2}), events)
    assert not seen
    assert not (tmp_path / "cache").exists()
    assert any(isinstance(event, Stage) and "with their labels" in event.title for event in events)
    lines = [json.loads(line) for line in (student.parent / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["labels"])
    assert lines[-1]["labels"] < lines[0]["labels"]
    assert lines[-1]["gate"] != pytest.approx(0.1, abs=1e-7)  # the labels' logits reach EduAttention


@pytest.mark.slow
def test_labels_beside_the_teacher_make_another_student_of_the_same_teacher(done: distill.Run) -> None:
    run = make_run(done.runs, seed=8, loss={**tiny.recipe()["loss"], "labels": {"weight": 0.5}})
    last = json.loads((do(run).parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["refinement"] + last["if_align"] + last["labels"], rel=1e-5)
    shares = [last[f"{name}_gradient_share"] for name in ("refinement", "if_align", "labels")]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    assert run.identity != make_run(done.runs, seed=8).identity


def test_labels_are_refused_where_the_images_have_none(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(4):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / f"{index}.png")
    run = make_run(
        tmp_path / "runs",
        data={"folder": str(tmp_path), "classes": ["a cat", "a dog"], "holdout_percent": 0},
        loss={"labels": {}},
    )
    for refused in (do, distill.plan):
        with pytest.raises(DataError) as caught:
            refused(run)  # type: ignore[operator]
        assert (caught.value.path, caught.value.field) == (tmp_path.name, "loss.labels")


def test_full_adaptation_without_labels_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(4):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / f"{index}.png")
    data = {"folder": str(tmp_path), "classes": ["a cat", "a dog"], "holdout_percent": 0}
    with pytest.raises(DataError) as caught:
        do(make_run(tmp_path / "runs", data=data))
    assert (caught.value.field, caught.value.found) == ("teacher.adapt", "full")


@pytest.mark.slow
def test_unlabelled_images_and_a_local_checkpoint_are_enough(done: distill.Run, tmp_path: Path) -> None:
    """The case that matters most: a folder, a class list, a pretrained teacher; no labels anywhere."""
    (saved,) = (done.runs / "teachers").glob("*/teacher.pt")
    weights = tmp_path / "clip.pt"
    torch.save(torch.load(saved, weights_only=True)["state_dict"], weights)
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    for index in range(40):
        done.source.train.open(index).save(photos / f"{index}.png")
    (tmp_path / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    run = make_run(
        tmp_path / "runs",
        data={"folder": str(tmp_path / "photos"), "classes": str(tmp_path / "classes.txt"), "workers": 0},
        teacher={"config": tiny.CLIP, "weights": str(weights)},
        optim={**tiny.OPTIM, "batch_size": 16},
    )
    student, record = load_student(do(run))
    assert record.teacher is None
    assert student(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 10)


@pytest.mark.slow
def test_a_prompts_only_student_stores_what_it_learned_and_needs_its_backbone(
    done: distill.Run, tmp_path: Path
) -> None:
    (saved,) = (done.runs / "teachers").glob("*/teacher.pt")
    weights = tmp_path / "clip.pt"
    torch.save(torch.load(saved, weights_only=True)["state_dict"], weights)
    settings = {"config": tiny.CLIP, "weights": str(weights), "prompts": {"tokens": 2, "depth": 2}}
    run = make_run(tmp_path / "runs", student=settings, optim={**tiny.OPTIM, "name": "sgd", "learning_rate": 0.05})
    path = do(run)
    names = set(torch.load(path, weights_only=True)["state_dict"])
    assert "backbone.tokens" in names
    assert not any(name.startswith("backbone.tower") for name in names)
    student, record = load_student(path)
    assert record.backbone.weights_sha256 is not None
    backbone = torch.load(weights, weights_only=True)
    assert torch.equal(student.state_dict()["backbone.tower.conv1.weight"], backbone["visual.conv1.weight"])
    backbone["visual.conv1.weight"] += 1
    torch.save(backbone, weights)
    with pytest.raises(CheckpointError, match="not trained on the current weights"):
        load_student(path)
    weights.unlink()
    with pytest.raises(Exception, match=r"clip\.pt"):
        load_student(path)


@pytest.mark.slow
def test_unreadable_images_are_named_and_skipped_within_the_limit(done: distill.Run, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for index in range(60 if split == "train" else 10):
            folder = tmp_path / "digits2" / split / str(index % 10)
            folder.mkdir(parents=True, exist_ok=True)
            done.source.train.open(index).save(folder / f"{index}.png")
    (tmp_path / "digits2" / "train" / "3" / "broken.png").write_bytes(b"not a picture")
    data = {"folder": str(tmp_path / "digits2"), "unreadable_limit_percent": 5.0, "workers": 0}
    optim = {**tiny.OPTIM, "batch_size": 20}
    events: list[Event] = []
    do(make_run(tmp_path / "runs", data=data, optim=optim), events)
    named = [event.text for event in events if isinstance(event, Notice) and "broken.png" in event.text]
    assert named
    strict = {**data, "unreadable_limit_percent": 0.5}
    with pytest.raises(DataError, match=r"1 of 61 images(.|\n)*broken\.png"):
        do(make_run(tmp_path / "strict", data=strict, optim=optim))


def test_a_plan_counts_without_training_anything(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    plan = distill.plan(run)
    assert (plan.steps_per_epoch, plan.state) == (tiny.TRAIN // 32, "new")
    assert "2 epochs of 10 steps" in adapt.describe_stage(stage(run.recipe, run.source, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_made_also_where_another_run_has_the_directory(done: distill.Run) -> None:
    plan = distill.plan(make_run(done.runs, optim={**tiny.OPTIM, "learning_rate": 0.004}))
    assert plan.steps_per_epoch == tiny.TRAIN // 32
    assert plan.state.startswith(f"refused: {done.student_file}: was made")
    assert "--fresh" in plan.state


@pytest.mark.slow
def test_an_outline_counts_what_the_built_models_have(done: distill.Run) -> None:
    outline = distill.outline(done.recipe, 10)
    student, _ = load_student(done.student_file)
    clip = build_clip(done.recipe.teacher, load_weights=False).model
    assert outline.student_image_tower_parameters == sum(p.numel() for p in student.parameters())
    assert outline.student_trainable_parameters == outline.student_image_tower_parameters
    assert outline.teacher_parameters == sum(p.numel() for p in clip.parameters())
    assert outline.teacher_image_tower_parameters == sum(p.numel() for p in clip.visual.parameters())
    assert outline.student_multiply_adds == multiply_adds(student, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        {"if_align": None},
        {"edu_attention": None},
        {"refinement": None},
        {"if_align": None, "edu_attention": None},
    ],
)
def test_every_term_can_be_switched_off_on_its_own(done: distill.Run, tmp_path: Path, loss: dict[str, None]) -> None:
    terms = {**tiny.recipe()["loss"], **loss}
    run = make_run(done.runs, loss=terms, seed=100 + len(str(loss)))
    student, _ = load_student(do(run))
    assert (student.edu_attention is None) == ("edu_attention" in loss)
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("if_align" in last) == ("if_align" not in loss)
