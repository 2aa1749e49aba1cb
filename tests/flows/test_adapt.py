"""Stage 1 with prompts: what is learned, what is kept, and who shares it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comkd_cli.data.sources import open_source
from comkd_cli.errors import CheckpointError, DataError, RecipeError
from comkd_cli.events import Event, Notice, Stage
from comkd_cli.flows import adapt, distill
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.models.backbones import build_clip
from comkd_cli.models.checkpoints import load_student, load_teacher
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.loading import load_saved_teacher
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

pytestmark = pytest.mark.usefixtures("few_digits")

PROMPTS = {"method": "promptsrc", "shots": 4, "epochs": 3, "tokens": 2, "vision_depth": 2, "text_depth": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), path)
    return path


def make_stage(runs: Path, weights: Path, root: Path = Path("data"), **changes: Any) -> adapt.Stage1:
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": {**PROMPTS, **changes.pop("adapt", {})}}
    recipe = parse_recipe(tiny.recipe(teacher=teacher, optim={**tiny.OPTIM, "epochs": 1}, **changes))
    return adapt.stage_1(recipe, open_source(recipe.data, root), root, runs)


def prepare(stage: adapt.Stage1, events: list[Event] | None = None):  # type: ignore[no-untyped-def]
    report = (events if events is not None else []).append
    return adapt.TeacherPreparation(stage, make_accelerator("fp32"), report, "again").prepare()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> adapt.Stage1:
    stage = make_stage(tmp_path_factory.mktemp("runs"), weights)
    prepare(stage)
    return stage


def test_only_prompts_are_saved_with_the_hash_of_what_they_stand_on(done: adapt.Stage1, weights: Path) -> None:
    saved = load_teacher(done.file)
    assert {name: tuple(value.shape) for name, value in saved.state_dict.items()} == {
        "prompts.vision": (2, 2, 32),
        "prompts.text": (1, 2, 16),
    }
    assert saved.record.backbone_sha256 is not None
    assert saved.record.origin.weights == str(weights)
    assert saved.record.metrics["test_top1_percent"] > 0
    assert not (done.folder / "state").exists()


def test_prompts_are_trained_on_four_shots_of_each_class(done: adapt.Stage1) -> None:
    first = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert {"cross_entropy", "text", "image", "logits"} <= set(first)
    source = done.prompt_source(done.settings.adapt)  # type: ignore[arg-type]
    counts = [list(source.train.labels or ()).count(label) for label in range(10)]
    assert counts == [4] * 10
    assert first["learning_rate"] == 1e-5  # the constant warm-up epoch


def test_base_classes_have_the_shots_that_they_have_among_all(done: adapt.Stage1, weights: Path) -> None:
    whole = done.prompt_source(done.settings.adapt)  # type: ignore[arg-type]
    stage = make_stage(done.runs, weights, adapt={"classes": "base"})
    base = stage.prompt_source(stage.settings.adapt)  # type: ignore[arg-type]
    assert base.class_names == whole.class_names[:5]
    kept = [k for k, label in zip(whole.train.keys, whole.train.labels or (), strict=True) if label < 5]
    assert list(base.train.keys) == kept
    assert base.test is not None
    assert set(base.test.labels or ()) == set(range(5))


@pytest.mark.slow
def test_the_kept_prompts_are_the_weighted_average_of_the_epochs(tmp_path: Path, weights: Path) -> None:
    """Of runs that stop after each epoch, since what an epoch does depends on those before it alone."""
    # Without its own cosine: SGD's rate depends on how many epochs there are.
    steady = {"warmup_epochs": 3, "warmup_learning_rate": 0.01}
    kept = []
    for epochs in (1, 2, 3):
        stage = make_stage(tmp_path / str(epochs), weights, adapt={**steady, "epochs": epochs, "gaussian": None})
        prepare(stage)
        kept.append(load_teacher(stage.file).state_dict)
    averaged = make_stage(tmp_path / "average", weights, adapt={**steady, "gaussian": {"mean": 2, "deviation": 1}})
    prepare(averaged)
    density = torch.exp(-0.5 * torch.tensor([1.0, 0.0, 1.0]))
    share = density / density.sum()
    for name, value in load_teacher(averaged.file).state_dict.items():
        expected = sum(w * state[name] for w, state in zip(share, kept, strict=True))
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(value, kept[-1][name], atol=1e-6)


def test_students_and_seeds_share_a_teacher(done: adapt.Stage1, weights: Path) -> None:
    written = done.file.stat().st_mtime_ns
    for changes in ({"seed": 7}, {"loss": {"refinement": {"weight": 5.0}, "if_align": None}}):
        events: list[Event] = []
        prepare(make_stage(done.runs, weights, **changes), events)
        assert [e.title for e in events if isinstance(e, Stage)] == [f"Teacher: reused from {done.file}"]
    assert done.file.stat().st_mtime_ns == written
    assert make_stage(done.runs, weights, adapt={"shots": 2}).folder != done.folder
    assert make_stage(done.runs, weights, adapt={"classes_at_once": 3}).folder == done.folder


def test_teachers_of_versions_that_clipped_no_gradients_keep_their_key(tmp_path: Path, weights: Path) -> None:
    stage = make_stage(tmp_path, weights)
    assert "clip_gradient_norm" not in stage.made_of["adapt"]
    assert make_stage(tmp_path, weights, adapt={"clip_gradient_norm": 1.0}).key != stage.key


def test_a_teacher_of_one_dataset_classifies_among_the_classes_of_another(
    done: adapt.Stage1, weights: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    images = open_source(done.recipe.data, tmp_path).train
    for index in range(12):
        images.open(index).save(pictures / f"{index}.png")
    data = {"folder": str(pictures), "classes": ("cat", "dog"), "holdout_percent": 0}
    events: list[Event] = []
    stage = make_stage(done.runs, weights, data=data, adapt={"data": {"dataset": "digits"}})
    ready = prepare(stage, events)
    assert stage.file == done.file
    assert ready.teacher.class_vectors.shape == (2, 16)
    other = make_stage(done.runs, weights, data={**data, "classes": ("cat", "wolf")}, adapt=stage_data())
    assert (other.key, other.contents) == (stage.key, stage.contents)
    long = {**data, "classes": ("cat", "wolf in the very dark forest")}
    prepare(make_stage(done.runs, weights, data=long, adapt=stage_data()), events)
    (text,) = [event.text for event in events if isinstance(event, Notice)]
    assert "the prompts of 1 of 2 classes are truncated ('wolf in the very dark forest')" in text


def stage_data() -> dict[str, Any]:
    return {"data": {"dataset": "digits"}}


@pytest.mark.slow
def test_a_changed_backbone_is_refused(done: adapt.Stage1, weights: Path, tmp_path: Path) -> None:
    moved = tmp_path / "clip.pt"
    moved.write_bytes(weights.read_bytes())
    stage = make_stage(tmp_path / "runs", moved)
    prepare(stage)
    torch.save(build_clip(Model(config=tiny.CLIP), seed=4).model.state_dict(), moved)
    with pytest.raises(CheckpointError, match="adapted on different weights") as caught:
        load_saved_teacher(stage.file, stage.source.class_names, torch.device("cpu"))
    assert caught.value.path == stage.file


@pytest.mark.slow
def test_a_student_of_a_prompted_teacher_is_scored_beside_it(done: adapt.Stage1, tmp_path: Path) -> None:
    run = distill.Run(done.recipe, "tiny", done.source, done.runs, done.contents, done.key)
    accelerator = make_accelerator("fp32")
    path = distill.distill(
        run, adapt.TeacherPreparation(done, accelerator, print, "again"), accelerator, lambda event: None, "again"
    )
    _, record = load_student(path)
    assert record.teacher is not None
    bench = Bench(torch.device("cpu"), Path("data"), lambda event: None)
    student, teacher = evaluate(str(path), tmp_path, bench).records
    assert (student.role, teacher.role) == ("student", "teacher")
    assert teacher.top1_percent == pytest.approx(load_teacher(done.file).record.metrics["test_top1_percent"])


@pytest.mark.slow
def test_truncated_prompts_are_reported_while_a_teacher_is_trained(
    done: adapt.Stage1, weights: Path, tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    """By either way of training, before hours pass; the 60 templates count apart from the class prompts."""
    for name in ("cat", "wolf in the very dark forest"):
        for index in range(4):
            write_image(tmp_path / "pictures" / "train" / name / f"{index}.png", seed=index)
    data = {"folder": str(tmp_path / "pictures"), "holdout_percent": 0}
    for adapts, count in (({"method": "full", "epochs": 1, "batch_size": 4}, 1), ({**PROMPTS, "epochs": 1}, 2)):
        teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": adapts}
        recipe = parse_recipe(tiny.recipe(teacher=teacher, data=data))
        events: list[Event] = []
        prepare(adapt.stage_1(recipe, open_source(recipe.data, tmp_path), tmp_path, tmp_path / "runs"), events)
        texts = [event.text for event in events if isinstance(event, Notice) and "are truncated" in event.text]
        assert len(texts) == count
        assert all("'wolf in the very dark forest'" in text for text in texts)
        assert any("of 120 prompts" in text for text in texts) == (count == 2)


def test_a_teacher_without_labels_or_weights_is_refused(weights: Path, tmp_path: Path, write_image: Any) -> None:
    for name in range(3):
        write_image(tmp_path / "pictures" / f"{name}.png")
    data = {"folder": str(tmp_path / "pictures"), "classes": ("a", "b"), "holdout_percent": 0}
    with pytest.raises(DataError) as caught:
        prepare(make_stage(tmp_path / "runs", weights, data=data))
    assert (caught.value.field, caught.value.found) == ("teacher.adapt", "promptsrc")
    with pytest.raises(RecipeError, match="set `weights`"):
        parse_recipe(tiny.recipe(teacher={"config": tiny.CLIP, "adapt": "promptsrc"}))
