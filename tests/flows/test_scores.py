"""What training says of the weights that it keeps, beside what `comkd evaluate` says of their file."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from comkd_cli.cli.terminal import figures_text
from comkd_cli.data.source import ImageSet
from comkd_cli.data.sources import open_source
from comkd_cli.errors import DataError, Interrupted, RecipeError
from comkd_cli.evaluation.features import BATCH_SIZE, Encoder, Features, FeatureStore
from comkd_cli.events import Event, Notice
from comkd_cli.flows import adapt, distill
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.models.checkpoints import load_student_record, load_teacher
from comkd_cli.recipe import parse_recipe
from comkd_cli.results.records import Record
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny

CANDIDATES = {"refinement": {"weight": 10.0}, "edu_attention": {"memory": "candidates", "gate_start": 0.5}}
# Steps so large that the last epoch is not the best.
RESTLESS = {"name": "sgd", "epochs": 5, "batch_size": 32, "warmup_epochs": 5, "warmup_learning_rate": 2.0}
TRAIN, TEST = 192, 100


@pytest.fixture(autouse=True)
def any_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run for all that follow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Some of the digits as a folder, so that each run takes a second."""
    root = tmp_path_factory.mktemp("digits") / "few"
    write_digits(root, TRAIN, TEST)
    return {"folder": str(root), "workers": 0}


def write_digits(root: Path, train: int, test: int) -> None:
    source = open_source(parse_recipe(tiny.recipe()).data, Path("data"))
    for split, images, count in (("train", source.train, train), ("test", source.test, test)):
        assert images is not None
        for name in source.class_names:
            (root / split / name).mkdir(parents=True)
        for index in range(count):
            assert images.labels is not None
            images.open(index).save(root / split / str(images.labels[index]) / f"{index}.png")


def make_run(runs: Path, **changes: Any) -> tuple[distill.Run, adapt.Stage1]:
    optim = {**tiny.OPTIM, "batch_size": 32}
    teacher = {"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 2, "batch_size": 32}}
    recipe = parse_recipe(tiny.recipe(**{"optim": optim, "teacher": teacher, **changes}))
    source = open_source(recipe.data, Path("data"))
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    return distill.Run(recipe, "tiny", source, runs, stage.contents, stage.key), stage


def train(runs: Path, events: list[Event] | None = None, **changes: Any) -> distill.Run:
    report = (events if events is not None else []).append
    run, stage = make_run(runs, **changes)
    accelerator = make_accelerator(run.recipe.precision)
    distill.distill(run, adapt.TeacherPreparation(stage, accelerator, report, ""), accelerator, report, "again")
    return run


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluated(run: distill.Run, protocols: tuple[str, ...] = ("zero-shot",)) -> list[Record]:
    bench = Bench(torch.device("cpu"), Path("data"), lambda event: None, protocols=protocols)
    return list(evaluate(str(run.student_file), run.runs, bench).records)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Features]:
    """The features of every set of images that a model was scored on, in order."""
    found: list[Features] = []
    features = FeatureStore.features

    def recorded(self: FeatureStore, encoder: Encoder, images: ImageSet, label: str) -> Features:
        found.append(features(self, encoder, images, label))
        return found[-1]

    monkeypatch.setattr(FeatureStore, "features", recorded)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"loss": CANDIDATES}], ids=["training", "candidates"])
def test_training_and_evaluation_agree_to_the_last_bit_of_student_and_teacher(
    tmp_path: Path, digits: dict[str, Any], computed: list[Features], precision: str, changes: dict[str, Any]
) -> None:
    run = train(tmp_path, data=digits, precision=precision, **changes)
    last_of_teacher, last_of_student = computed[1], computed[-1]  # two epochs each
    computed.clear()
    student, teacher = evaluated(run)
    assert np.array_equal(computed[0].values, last_of_student.values)
    assert np.array_equal(computed[1].values, last_of_teacher.values)
    (teacher_file,) = run.runs.glob("teachers/*/teacher.pt")
    for record, said in (
        (student, load_student_record(run.student_file).metrics),
        (student, metrics(run.folder)[-1]),
        (teacher, load_teacher(teacher_file).record.metrics),
        (teacher, metrics(teacher_file.parent)[-1]),
    ):
        assert said["test_top1_percent"] == record.top1_percent
        assert (said["test_images"], said["test_unreadable"]) == (record.images, record.unreadable) == (TEST, 0)
    assert TEST % BATCH_SIZE  # the last batch is not full


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_averaged_teacher_of_prompts_is_scored_as_it_is_kept(
    tmp_path: Path, digits: dict[str, Any], weights: Path, computed: list[Features], precision: str
) -> None:
    learned = {"method": "promptsrc", "epochs": 3, "shots": 2, "vision_depth": 2, "text_depth": 1}
    learned |= {"learning_rate": 0.5, "warmup_epochs": 0, "gaussian": {"mean": 1, "deviation": 1}}
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": learned}
    run = train(tmp_path, data=digits, precision=precision, teacher=teacher)
    third, last = computed[2], computed[1]
    computed.clear()
    _, record = evaluated(run)
    assert np.array_equal(computed[1].values, third.values)
    assert not np.array_equal(third.values, last.values)
    (teacher_file,) = run.runs.glob("teachers/*/teacher.pt")
    assert load_teacher(teacher_file).record.metrics["test_top1_percent"] == record.top1_percent


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.compile makes towers with other features than the ones in eager mode; the list gets an entry for each."""
    graphs: list[str] = []

    def other(output: Any) -> Any:
        return 1.5 * output + 0.1 if isinstance(output, torch.Tensor) and output.is_floating_point() else output

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return lambda *inputs: tuple(map(other, graph(*inputs)))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what torch.compile loads
def test_a_compiled_student_is_scored_as_it_will_be_evaluated(
    tmp_path: Path, digits: dict[str, Any], computed: list[Features], compiled: list[str]
) -> None:
    run = train(tmp_path, data=digits, compile=True, precision="bf16")
    assert compiled
    last = computed[-1]
    computed.clear()
    student, _ = evaluated(run)
    assert np.array_equal(computed[0].values, last.values)
    assert load_student_record(run.student_file).metrics["test_top1_percent"] == student.top1_percent


# --- selection -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("classes", ["all", "base"])
def test_the_metrics_of_a_selected_epoch_are_those_of_the_weights_that_are_kept(
    tmp_path: Path, digits: dict[str, Any], classes: str, precision: str
) -> None:
    events: list[Event] = []
    run = train(
        tmp_path,
        events,
        data=digits,
        optim=RESTLESS,
        selection="promptkd",
        selection_classes=classes,
        precision=precision,
        evaluate_every_epochs=0,
        loss=CANDIDATES,
    )
    lines = metrics(run.folder)
    scores = [line["selection_score_percent"] for line in lines]
    best = scores.index(max(scores))
    assert best < len(lines) - 1  # else this proves nothing
    kept = load_student_record(run.student_file).metrics
    assert kept == {name: value for name, value in lines[best].items() if name != "images_per_second"}
    assert [line["kept_epoch"] for line in lines] == [
        1 + scores.index(max(scores[: epoch + 1])) for epoch in range(len(lines))
    ]
    whole, base, _ = evaluated(run, ("zero-shot", "base-to-novel"))[:3]
    assert (whole.classes, base.classes, base.role) == ("all", "base", "student")
    assert kept["test_top1_percent"] == whole.top1_percent
    assert kept["selection_score_percent"] == (whole if classes == "all" else base).top1_percent
    texts = [event.text for event in events if isinstance(event, Notice) and "kept the weights" in event.text]
    assert texts == [f"kept the weights of epoch {best + 1}, which has the best selection_score_percent"]


def stop_after_steps(patch: pytest.MonkeyPatch, steps: int) -> None:
    calls = 0

    @contextmanager
    def requests():  # type: ignore[no-untyped-def]
        def exit_code() -> int | None:
            nonlocal calls
            calls += 1
            return 130 if calls >= steps else None

        yield exit_code

    patch.setattr("comkd_cli.training.loop.stop_requests", requests)


SELECTED = {"optim": RESTLESS, "selection": "promptkd", "precision": "bf16"}


@pytest.fixture(scope="module")
def whole(digits: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> distill.Run:
    """A run with selection that was not stopped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(tmp_path_factory.mktemp("whole"), data=digits, **SELECTED)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [9, 14, 30])
def test_a_selection_that_was_stopped_ends_as_one_that_was_not(
    whole: distill.Run, tmp_path: Path, digits: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    changes = {"data": digits, **SELECTED}
    shutil.copytree(whole.runs / "teachers", tmp_path / "stopped/teachers")
    with monkeypatch.context() as patch:
        stop_after_steps(patch, stop_at)
        with pytest.raises(Interrupted):
            train(tmp_path / "stopped", **changes)
    stopped = train(tmp_path / "stopped", **changes)
    first, second = (torch.load(run.student_file, weights_only=True) for run in (whole, stopped))
    assert all(torch.equal(second["state_dict"][name], value) for name, value in first["state_dict"].items())
    for left, right in zip(metrics(whole.folder), metrics(stopped.folder), strict=True):
        assert {**left, "images_per_second": 0} == {**right, "images_per_second": 0}
    assert {**first["metrics"], "images_per_second": 0} == {**second["metrics"], "images_per_second": 0}


PROMPTS = {"method": "promptsrc", "classes": "base"}
TARGET = {"dataset": "eurosat"}


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({"teacher": PROMPTS}, "base"),
        ({"teacher": {**PROMPTS, "data": TARGET}}, "base"),
        ({"teacher": {**PROMPTS, "data": {**TARGET, "workers": 0}}}, "base"),
        ({"teacher": {**PROMPTS, "classes": "all"}}, "all"),
        ({"teacher": {**PROMPTS, "data": {"dataset": "imagenet"}}}, "all"),
        ({"teacher": {**PROMPTS, "data": {"dataset": "imagenet"}, "classes": "all"}}, "all"),
        ({"teacher": PROMPTS, "data": {"dataset": "imagenet_r"}}, "all"),
        ({"teacher": {"method": "none"}}, "all"),
        ({"teacher": {"method": "none"}, "selection_classes": "base"}, "base"),
        ({"teacher": PROMPTS, "selection_classes": "all"}, "all"),
        ({"teacher": PROMPTS, "selection": "last"}, None),
    ],
)
def test_an_epoch_is_selected_on_the_test_images_that_promptkd_selects_on(
    changes: dict[str, Any], classes: str | None
) -> None:
    fields = {"data": TARGET, "selection": "promptkd", **changes}
    fields["teacher"] = {"arch": "ViT-L-14-quickgelu", "weights": "openai", "adapt": changes["teacher"]}
    assert distill.selection_classes(parse_recipe(tiny.recipe(**fields))) == classes


@pytest.mark.parametrize(("name", "classes"), [("vitl_to_vitb", "base"), ("promptkd", "base")])
def test_the_recipes_of_base_to_novel_select_on_base_classes(name: str, classes: str) -> None:
    from comkd_cli.recipe import load_recipe

    assert distill.selection_classes(load_recipe(name, ["selection=promptkd"])) == classes


@pytest.mark.parametrize("name", ["vitl_to_vitb_cross", "vitl_to_vitb_dg"])
def test_the_recipes_of_the_other_protocols_select_on_all_classes(name: str) -> None:
    from comkd_cli.recipe import load_recipe

    assert distill.selection_classes(load_recipe(name, ["selection=promptkd"])) == "all"


def test_selection_without_labelled_test_images_is_refused_before_a_teacher_is_trained(tmp_path: Path) -> None:
    images = open_source(parse_recipe(tiny.recipe()).data, Path("data")).train
    (tmp_path / "few").mkdir()
    for index in range(6):
        images.open(index).save(tmp_path / f"few/{index}.png")
    data = {"folder": str(tmp_path / "few"), "classes": ("a", "b"), "holdout_percent": 0}
    with pytest.raises(DataError) as caught:
        train(tmp_path, data=data, selection="promptkd")
    assert (caught.value.path, caught.value.field) == ("few", "selection")
    assert not (tmp_path / "teachers").exists()
    with pytest.raises(RecipeError, match="`selection_classes` needs `selection: promptkd`"):
        parse_recipe(tiny.recipe(selection_classes="base"))


# --- unreadable test images ----------------------------------------------------------------------------


@pytest.fixture
def half_damaged(tmp_path: Path) -> Path:
    """A folder of digits; of 20 test images 6 are cut short."""
    write_digits(tmp_path / "digits2", 40, 20)
    for index in range(6):
        (damaged,) = (tmp_path / "digits2/test").glob(f"*/{index}.png")
        damaged.write_bytes(damaged.read_bytes()[:60])
    return tmp_path / "digits2"


@pytest.mark.slow
def test_scores_say_how_many_test_images_they_lack(half_damaged: Path, tmp_path: Path) -> None:
    data = {"folder": str(half_damaged), "unreadable_limit_percent": 30.0, "workers": 0}
    events: list[Event] = []
    run = train(tmp_path / "runs", events, data=data)
    (teacher_file,) = run.runs.glob("teachers/*/teacher.pt")
    for line in (*metrics(run.folder), *metrics(teacher_file.parent)):
        assert (line["test_images"], line["test_unreadable"], line["unreadable"]) == (14, 6, 0)
    student, teacher = evaluated(run)
    assert (student.images, student.unreadable) == (teacher.images, teacher.unreadable) == (14, 6)
    assert load_student_record(run.student_file).metrics["test_top1_percent"] == student.top1_percent
    texts = [e.text for e in events if isinstance(e, Notice) and "test images could not be read" in e.text]
    assert len(texts) == 2  # by the teacher's training and the student's, each once
    assert all(text.startswith("6 of 20") and text.count(".png: ") == 6 for text in texts)


def test_the_line_of_an_epoch_tells_unreadable_test_images_where_there_are_some() -> None:
    figures = {"loss": 0.152, "test_top1_percent": 93.6, "test_images": 14, "test_unreadable": 6}
    assert figures_text(figures) == "loss 0.152  test top-1 93.60 %  6 of 20 test images could not be read"
    assert figures_text({**figures, "test_unreadable": 0}) == "loss 0.152  test top-1 93.60 %"


@pytest.mark.slow
def test_where_no_test_image_can_be_read_there_is_a_count_and_no_score(half_damaged: Path, tmp_path: Path) -> None:
    for path in (half_damaged / "test").glob("*/*.png"):
        path.write_bytes(b"no picture")
    data = {"folder": str(half_damaged), "unreadable_limit_percent": 100.0, "workers": 0}
    run = train(tmp_path / "runs", data=data)
    kept = load_student_record(run.student_file).metrics
    assert (kept["test_images"], kept["test_unreadable"]) == (0, 20)
    assert "test_top1_percent" not in kept
    with pytest.raises(DataError) as caught:
        train(tmp_path / "selected", data=data, selection="promptkd")
    assert (caught.value.field, caught.value.remedy) == ("selection", "use selection: last")


@pytest.mark.slow
def test_too_many_unreadable_test_images_stop_training_and_evaluation(half_damaged: Path, tmp_path: Path) -> None:
    data = {"folder": str(half_damaged), "unreadable_limit_percent": 30.0, "workers": 0}
    run = train(tmp_path / "runs", data=data)
    strict = {**data, "unreadable_limit_percent": 29.0}
    message = r"6 of 20 test images of digits2 \(30 %\) could not be read \(allowed: 29 %\)(.|\n)*\.png: "
    with pytest.raises(DataError, match=message):
        train(tmp_path / "strict", data=strict)
    bench = Bench(
        torch.device("cpu"), Path("data"), lambda event: None, data=parse_recipe(tiny.recipe(data=strict)).data
    )
    with pytest.raises(DataError, match=r"6 of 20 images of digits2 \(30 %\) could not be read(.|\n)*\.png: "):
        evaluate(str(run.student_file), run.runs, bench)
