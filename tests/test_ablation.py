"""The study's tooling: its rows, its statistics, and a small study from end to end."""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.ablation import latency, pairs, plots, rows, running, tables
from benchmarks.ablation.__main__ import main
from benchmarks.ablation.figures import calibration_error_percent, interval
from comkd_cli.data.digits import digits_source
from comkd_cli.data.folder import folder_source
from comkd_cli.data.loaders import scoring_batches
from comkd_cli.errors import ComkdError
from comkd_cli.flows.distill import outline
from comkd_cli.models.checkpoints import load_student
from comkd_cli.recipe import parse_recipe
from comkd_cli.teachers.loading import build_teacher
from comkd_cli.teachers.of_student import teacher_of_student
from tests import tiny, warm
from tests.shell import assert_parsed

TINY = replace(
    pairs.CIFAR10,
    teacher_config=tiny.CLIP,
    teacher_adapt={"method": "full", "epochs": 2, "batch_size": 32},
    students={"small": tiny.TOWER},
    optim={"name": "adamw", "batch_size": 32, "learning_rate": 3e-3},
    epochs=2,
    image_counts=(20, 120),
    grid_images=60,
    grid_epochs=1,
)
EVERY_ROW = [row for make in rows.STUDIES.values() for row in make(pairs.CIFAR10)]
CHOSEN = {name: term.middle for name, term in rows.TERMS.items()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 4 test images of each digit."""
    folder, source = tmp_path_factory.mktemp("images") / "digits", digits_source("a photo of a {}.")
    for split, images, most in (("train", source.train, 12), ("test", source.test, 4)):
        assert images is not None
        counts: dict[int, int] = {}
        for index, label in enumerate(images.labels or ()):
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= most:
                path = folder / split / source.class_names[label] / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                images.open(index).save(path)
    return folder


@pytest.mark.parametrize("row", EVERY_ROW, ids=lambda row: row.name)
def test_each_row_is_a_recipe_with_its_terms_alone(row: rows.Row) -> None:
    recipe = parse_recipe(rows.recipe_of(row, pairs.CIFAR10, CHOSEN, "data/all"))
    terms = ("refinement", "if_align", "edu_attention", "feature_mse", "feature_cosine", "labels")
    wanted = {"edu_attention" if name == rows.CANDIDATES else name for name in row.terms}
    assert {name for name in terms if getattr(recipe.loss, name) is not None} == wanted
    if recipe.loss.refinement is not None:
        assert recipe.loss.refinement.weight == (5 if row.half else 10)  # of KL / (images * classes)
    if recipe.loss.edu_attention is not None:
        assert (recipe.loss.edu_attention.memory == "candidates") == (rows.CANDIDATES in row.terms)


def test_rows_have_names_of_their_own_and_are_compared_with_rows_that_differ_in_the_objective_alone() -> None:
    by_name = {row.name: row for row in EVERY_ROW}
    assert len(by_name) == len(EVERY_ROW)
    bases = {"size": "labels", "tricks": "feature_cosine"}  # of the other studies: refinement
    lengths = ("shorter_12_epochs", "longer_120_epochs", "feature_cosine_longest")
    for row in EVERY_ROW:
        base = by_name[row.base]
        alone = row.name.startswith("temperature") or row.name == "feature_cosine_longest"
        assert base.terms == (row.terms if alone else (bases.get(row.study, "refinement"),))
        assert (base.images, base.half, base.student) == (row.images, row.half, row.student)
        assert base.epochs == row.epochs or row.name in lengths


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("feature_cosine_tricks", "teacher_cache.views", 40),
        ("views_1_tricks", "teacher_cache.views", 1),
        ("cutmix_tricks", "augment.mix.kind", "cutmix"),
        ("temperature_4_tricks", "loss.refinement.temperature", 4.0),
        ("ema_tricks", "ema_decay", 0.99),
        ("sgd_tricks", "optim.name", "sgd"),
        ("longer_120_epochs", "optim.epochs", 120),
        ("longer_120_epochs_views_8", "optim.epochs", 120),
        ("longer_120_epochs_views_8", "teacher_cache.views", 8),
        ("labels_120_epochs", "optim.epochs", 120),
        ("feature_cosine_long", "student.config.vision_cfg.image_size", 64),
        ("labels_long", "teacher_cache.views", 24),
        ("feature_cosine_longest", "teacher_cache.views", 24),
        ("feature_cosine_longest", "optim.epochs", 48),
        ("feature_cosine", "student.config.vision_cfg.image_size", 32),  # after the others: they share the config
    ],
)
def test_a_trick_changes_its_field_and_nothing_else_of_the_training(name: str, field: str, value: object) -> None:
    (row,) = (row for row in EVERY_ROW if row.name == name)
    recipe: Any = parse_recipe(rows.recipe_of(row, pairs.CIFAR10, CHOSEN, "data/all"))
    for part in field.split("."):
        recipe = recipe[part] if isinstance(recipe, dict) else getattr(recipe, part)
    assert recipe == value


@pytest.mark.slow
@pytest.mark.parametrize("row", rows.objective_rows(pairs.TRANSFORMERS), ids=lambda row: row.name)
def test_transformers_are_frozen_and_their_prompts_trained(row: rows.Row) -> None:
    recipe = parse_recipe(rows.recipe_of(row, pairs.TRANSFORMERS, CHOSEN, "data/train-5000"))
    assert (recipe.student.train, recipe.student.weights) == ("prompts", "vit_64.pt")
    assert recipe.teacher.adapt.method == "promptsrc"
    found = outline(recipe, 10)
    assert found.student_trainable_parameters < 0.5 * found.student_image_tower_parameters


def test_equal_steps_show_as_many_images_as_all_of_them_do() -> None:
    wanted = pairs.CIFAR10.epochs * pairs.CIFAR10.image_counts[-1]
    for row in rows.image_rows(pairs.CIFAR10):
        assert row.images is not None
        equal = row.images * row.epochs == wanted if "steps" in row.name else row.epochs == pairs.CIFAR10.epochs
        assert equal, row.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "name", "least"), [("convnets", "comkd", 8), ("larger_teacher", "feature_cosine", 16)]
)
def test_the_student_has_at_most_an_eighth_or_a_sixteenth_of_its_teachers_image_tower(
    pair: str, name: str, least: int
) -> None:
    (row,) = (row for row in rows.objective_rows(pairs.PAIRS[pair]) if row.name == name)
    found = outline(parse_recipe(rows.recipe_of(row, pairs.PAIRS[pair], CHOSEN, "data/all")), 10)
    assert least < found.teacher_image_tower_parameters / found.student_image_tower_parameters < 2 * least


def test_the_grid_has_the_same_factors_for_every_term() -> None:
    for name, tried in rows.grid_rows(pairs.CIFAR10).items():
        weights = [row.weights[name] for row in tried]
        assert [weight / weights[1] for weight in weights] == pytest.approx([0.2, 1, 5])


def test_subsets_are_balanced_nested_and_apart_from_what_weights_are_chosen_on(digits: Path, tmp_path: Path) -> None:
    study = running.Study(TINY, tmp_path, digits)
    few, more = (study.folder_of(rows.Row("images", "it", ("labels",), "small", 1, 1, count)) for count in (20, 60))
    (first, *_), *_ = rows.grid_rows(TINY).values()
    grid = study.folder_of(first)

    def below(folder: str, split: str) -> set[str]:
        root = tmp_path / folder / split
        return {path.relative_to(root).as_posix() for path in root.rglob("*.png")}

    assert below(few, "train") < below(more, "train") == below(grid, "train")
    assert {len(list(label.iterdir())) for label in (tmp_path / few / "train").iterdir()} == {2}
    # a tenth of 12 images, rounded: one of each class, of the training images, that no student of the grid sees
    assert len(below(grid, "test")) == 10
    assert not below(grid, "test") & below(grid, "train")
    assert all((digits / "train" / name).is_file() for name in below(grid, "test"))
    assert len(list((tmp_path / few / "test").resolve().rglob("*.png"))) == 40


def test_a_class_with_too_few_images_is_refused(digits: Path, tmp_path: Path) -> None:
    study = running.Study(TINY, tmp_path, digits)
    with pytest.raises(ComkdError, match="needs 13 of each class") as caught:
        study.folder_of(rows.Row("grid", "it", ("labels",), "small", 1, 1, 120))
    assert caught.value.found == 12


def test_calibration_error_is_the_one_worked_by_hand() -> None:
    # two classes: confidences 0.8, 0.8, 0.6, of which the second and third are right
    logits = np.log(np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]]))
    labels = np.array([1, 0, 1])
    by_hand = 100 * (abs(1 - 1.6) + abs(1 - 0.6)) / 3
    assert calibration_error_percent(logits, labels) == pytest.approx(by_hand)
    sure = np.array([[100.0, 0.0], [0.0, 100.0]])
    assert calibration_error_percent(sure, np.array([0, 1])) == pytest.approx(0, abs=1e-9)
    assert calibration_error_percent(sure, np.array([1, 0])) == pytest.approx(100)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    found = interval([1.0, 2.0, 3.0])
    # mean 2, standard error 1 / sqrt(3), and 4.3027 the 97.5 % quantile of t with 2 degrees of freedom
    assert found == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-5)
    base, other = [60.0, 61.5, 60.7, 62.0], [61.0, 61.7, 61.9, 62.1]
    test = stats.ttest_rel(other, base).confidence_interval(0.95)
    assert interval([b - a for a, b in zip(base, other, strict=True)]) == pytest.approx((test.low, test.high))
    assert interval([1.0]) is None


def record(top1: float, **figures: Any) -> dict[str, Any]:
    known = {"agreement_percent": 90.0, "calibration_error_percent": 3.0, "gate": None, "gradient_shares": {}}
    return {
        "training_seconds": 120,
        "figures": {"top1_percent": top1, "parameters": 7, "multiply_adds": 9, **known, **figures},
    }


def test_a_row_is_compared_with_its_base_seed_by_seed() -> None:
    by_name = {row.name: row for row in rows.objective_rows(pairs.CIFAR10)}
    shares = [{"refinement": 0.9, "if_align": 0.1}, {"refinement": 0.7, "if_align": 0.3}]
    records = {
        ("refinement", 1): record(60.0),
        ("refinement", 2): record(62.0),
        ("refinement", 3): record(90.0),  # has no partner and does not count
        ("comkd", 1): record(61.0, gate=0.1, gradient_shares=shares[0]),
        ("comkd", 2): record(64.0, gate=0.3, gradient_shares=shares[1]),
    }
    found = tables.statistics_of(by_name["comkd"], records)
    assert found is not None
    assert found["difference"]["seeds"] == [1, 2]
    assert found["difference"]["mean"] == pytest.approx(1.5)
    assert found["top1_percent"] == pytest.approx({"mean": 62.5, "deviation": math.sqrt(4.5)})
    assert found["gate"]["mean"] == pytest.approx(0.2)
    assert found["gradient_shares"] == pytest.approx({"refinement": 0.8, "if_align": 0.2})
    assert found["training_minutes"] == pytest.approx(2)
    base = tables.statistics_of(by_name["refinement"], records)
    assert base is not None
    assert base["difference"]["mean"] is None
    assert tables.statistics_of(by_name["labels"], records) is None
    table = tables.markdown([base, found])
    assert "| comkd | 2 | 62.50 ± 2.12 | +1.50 (-4.85 to +7.85) | 90.00 ± 0.00 |" in table


def test_seeds_come_round_by_round_so_that_what_is_finished_is_balanced() -> None:
    made = [
        replace(row, seeds=seeds) for row, seeds in zip(rows.objective_rows(pairs.CIFAR10)[:2], (2, 1), strict=True)
    ]
    assert [job.name for job in running.jobs_of(made, [1, 2, 3])] == [
        "refinement-seed1",
        "refinement_if_align-seed1",
        "refinement-seed2",
    ]


def test_a_dry_run_lists_every_run_and_leaves_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(digits), "--out", str(tmp_path / "study"), "--dry-run", "--rate", "100"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    # 400,000 images at 100 a second are 66.7 minutes
    assert f"{'comkd-seed5':60} {'50,000':>8} {8:>6}  66.7" in lines
    assert lines[-1].startswith(f"{12 + 8 * 5} runs, ")
    # Without a grid for rows that have one term, and with one term's for those that have it beside refinement.
    for row, runs in (("feature_cosine", 5), ("refinement_labels", 3 + 5)):
        assert main([*arguments, "--rows", row]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{runs} runs, ")
    assert not (tmp_path / "study").exists()


def test_a_row_that_does_not_exist_is_refused_and_not_left_out(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--data", str(digits), "--out", str(tmp_path), "--rows", "refinement", "refinment"])
    assert "--rows: refinment: not among refinement, refinement_if_align" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "error"), [(130, running.Stopped), (143, running.Stopped), (-15, running.Stopped), (1, ComkdError)]
)
def test_a_run_that_was_stopped_did_not_fail(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"import os, signal; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
    start = subprocess.Popen
    monkeypatch.setattr(running.subprocess, "Popen", lambda _, **__: start([sys.executable, "-c", script]))
    with pytest.raises(error):
        running.Study(TINY, tmp_path, tmp_path).distill("it", {})


def test_half_of_the_classes_are_kept_from_the_student(digits: Path, tmp_path: Path) -> None:
    study = running.Study(TINY, tmp_path, digits)
    row = rows.base_to_novel_rows(TINY)[0]
    for _ in range(2):  # made once, found again
        assert study.folder_of(row) == "data/base"
    for split in ("train", "test"):
        assert sorted(path.name for path in (tmp_path / "data" / "base" / split).iterdir()) == list("01234")
        assert sorted(path.name for path in (tmp_path / "data" / "novel" / split).iterdir()) == list("56789")


@pytest.fixture
def short_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs choose the weight of IFAlign; EduAttention's needs none."""
    monkeypatch.setattr(rows, "TERMS", {"if_align": rows.TERMS["if_align"]})
    monkeypatch.setattr(rows, "FACTORS", (0.2, 1.0))


@pytest.fixture
def forked_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study's commands as processes of tests/warm.py."""
    start = subprocess.Popen

    def forked(command: list[str], **options: Any) -> Any:
        if command[1:3] != ["-m", "comkd_cli"]:
            return start(command, **options)
        process = warm.Process(*command[3:], cwd=options["cwd"])
        process.communicate()
        return process

    monkeypatch.setattr(running.subprocess, "Popen", forked)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("forked_runs")
def test_a_student_of_half_of_the_classes_answers_about_the_others_as_its_checkpoint_does(
    digits: Path, tmp_path: Path
) -> None:
    study = running.Study(TINY, tmp_path, digits)
    row = next(row for row in rows.base_to_novel_rows(TINY) if rows.CANDIDATES in row.terms)
    figures = study.run(running.Job(row, 1), {"edu_attention": 25.0})["figures"]
    assert (figures["images"], figures["gradient_shares"]) == (20, {})
    (student_file,) = (tmp_path / "runs" / row.name).glob("*/seed1/student.pt")
    student, record = load_student(student_file)
    assert record.class_names == tuple("01234")
    assert student.uses_candidates
    novel = folder_source(tmp_path / "data" / "novel", None, record.template)
    ready = build_teacher(
        record.recipe.teacher.model_copy(update={"weights": str(tmp_path / "teacher.pt")}),
        novel.class_names,
        record.template,
        torch.device("cpu"),
    )
    assert novel.test is not None
    (batch,) = scoring_batches(novel.test, record.preprocessing, 20, 0)
    assert batch.labels is not None
    with torch.inference_mode():
        right = student(batch.inputs[0], ready.teacher.class_vectors).logits.argmax(dim=1) == batch.labels
    assert figures["novel_top1_percent"] == pytest.approx(100 * right.double().mean().item())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("forked_runs")
def test_the_frozen_clips_know_the_first_classes_and_the_teacher_of_a_row_is_the_adapted_one(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    clip = {**tiny.CLIP, "vision_cfg": tower}
    settings = replace(
        TINY,
        teacher_config=clip,
        students={"vit": clip},
        optim={"name": "sgd", "batch_size": 16, "learning_rate": 0.02},
        pretrained_classes=7,
        prompts={"depth": 2},
        stage_1={"method": "promptsrc", "shots": 2, "epochs": 1, "batch_size": 4, "vision_depth": 2, "text_depth": 1},
        images=20,
    )
    study = running.Study(settings, tmp_path, digits)
    record = study.run(running.Job(rows.objective_rows(settings)[0], 1), {})
    monkeypatch.chdir(tmp_path)
    assert sorted(path.name for path in (tmp_path / "data" / "pretraining" / "train").iterdir()) == list("0123456")
    assert {path.name for path in tmp_path.glob("*.pt")} == {"teacher.pt", "vit.pt"}
    (student_file,) = (tmp_path / "runs" / "refinement").glob("*/seed1/student.pt")
    student, of_student = load_student(student_file)
    frozen = torch.load(tmp_path / "vit.pt", weights_only=True)["visual.conv1.weight"]
    (found,) = (value for name, value in student.backbone.state_dict().items() if name.endswith("conv1.weight"))
    assert torch.equal(found, frozen)
    ready = teacher_of_student(student_file, student, of_student, torch.device("cpu"))
    source = folder_source(tmp_path / "data" / "train-20", None, of_student.template)
    assert source.test is not None
    (batch,) = scoring_batches(source.test, ready.preprocessing, 40, 0)
    assert batch.labels is not None
    with torch.inference_mode():
        right = ready.teacher(batch.inputs[0]).logits.argmax(dim=1) == batch.labels
    assert record["figures"]["teacher_top1_percent"] == pytest.approx(100 * right.double().mean().item())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("short_grid", "forked_runs")
def test_a_small_study_from_end_to_end(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    arguments = ["--data", str(digits), "--out", str(out), "--seeds", "1"]
    first = [*arguments, "--rows", "refinement_if_align"]
    assert main(first, {"convnets": TINY}) == 0
    document = json.loads((out / "ablation.json").read_text())
    grid = document["grid"]["validation_top1_percent"]["if_align"]
    assert list(grid) == ["0.002", "0.01"]
    chosen = document["grid"]["chosen"]["if_align"]
    assert grid[f"{chosen:g}"] == max(grid.values())
    runs = {run["row"]: run for run in document["runs"]}
    assert set(runs) == {"grid_if_align_0.002", "grid_if_align_0.01", "refinement_if_align"}
    assert set(document["grid"]["chosen"]) == {"if_align"}
    assert runs["grid_if_align_0.01"]["figures"]["images"] == 10  # of the training images
    row = runs["refinement_if_align"]
    assert row["recipe"]["loss"]["if_align"] == {"weight": chosen}
    assert row["command"] == "comkd distill recipes/refinement_if_align.yaml --seed 1 --runs runs"
    assert sum(row["figures"]["gradient_shares"].values()) == pytest.approx(1)
    # the student's own record of its last epoch agrees with what was measured here
    (metrics,) = (out / "runs" / "refinement_if_align").glob("*/seed1/metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[-1])["test_top1_percent"] == row["figures"]["top1_percent"]
    assert "| refinement_if_align | 1 |" in (out / "ablation.md").read_text()

    # a second call runs nothing, and another study takes over what is finished if its teacher is the same
    capfd.readouterr()
    dates = [path.stat().st_mtime_ns for path in sorted((out / "records").iterdir())]
    assert main([*first, "--adopt", str(out / "ablation.json")], {"convnets": TINY}) == 0
    assert "took over 0 finished runs" in capfd.readouterr().out
    assert [path.stat().st_mtime_ns for path in sorted((out / "records").iterdir())] == dates
    document["runs"][0]["teacher_sha256"] = "another"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    assert main([*first, "--adopt", str(other)], {"convnets": TINY}) == 1
    assert "its figures cannot be compared" in capfd.readouterr().err


def test_the_latency_of_each_finished_size_is_that_of_its_export_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = list(pairs.CIFAR10.students)[-1]
    for row in ("feature_cosine", f"feature_cosine_{small}", "labels", "refinement"):
        (tmp_path / "runs" / row / "all" / "seed1").mkdir(parents=True)
        (tmp_path / "runs" / row / "all" / "seed1" / "student.pt").touch()
    lines = [
        {"name": name, "threads": threads, "seconds": threads * seconds}
        for threads in (1, 2)
        for name, seconds in (("pytorch", 0.5), ("fp32", 0.25), ("int8", 0.125))
    ]
    precisions = {"int8": {"parity": {"top1_agreement_percent": 97.5}}}
    manifest = {"latency": lines, "precisions": precisions, "parameters": 7, "multiply_adds": 9}
    start = subprocess.run

    def export(command: list[str], **options: Any) -> Any:
        if command[1:3] != ["-m", "comkd_cli"]:
            return start(command, **options)
        assert_parsed(shlex.join(["comkd", *command[3:]]))
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(latency.subprocess, "run", export)
    monkeypatch.setattr("sys.argv", ["latency", str(tmp_path), str(tmp_path / "latency.json")])
    latency.main()
    sizes = json.loads((tmp_path / "latency.json").read_text())["sizes"]
    assert list(sizes) == [pairs.CIFAR10.student, small]
    assert sizes[small]["seconds"] == {"pytorch": 0.5, "fp32": 0.25, "int8": 0.125}
    assert (sizes[small]["int8_agreement_percent"], sizes[small]["multiply_adds"]) == (97.5, 9)


def sized(row: str, seed: int, top1: float, parameters: int = 1000) -> dict[str, Any]:
    """A finished run with what a student costs."""
    costs = {"parameters": parameters, "multiply_adds": 9 * parameters, "teacher_top1_percent": 80.0}
    study = "objectives" if row in rows.OBJECTIVES else "size"
    return {"study": study, "row": row, "seed": seed, "figures": {"top1_percent": top1, **costs}}


def test_each_cost_of_a_size_has_the_points_of_each_objective_and_the_teacher() -> None:
    small, first = list(pairs.CIFAR10.students)[-1], pairs.CIFAR10.student
    runs = [sized("feature_cosine", seed, 72.0 + seed) for seed in (1, 2)] + [sized("labels", 1, 70.0)]
    runs += [sized(f"{name}_{small}", 1, top1, 100) for name, top1 in (("feature_cosine", 50.0), ("labels", 45.0))]
    by_parameters, by_multiply_adds = plots.sizes({"runs": runs}, {}).axes
    assert [list(line.get_xdata()) for line in by_parameters.lines[:2]] == [[100, 1000]] * 2
    assert [list(line.get_xdata()) for line in by_multiply_adds.lines[:2]] == [[900, 9000]] * 2
    found = [list(line.get_ydata()) for line in by_parameters.lines]
    assert found == [[50.0, 73.5], [45.0, 70.0], [80.0, 80.0]]
    *_, by_latency = plots.sizes({"runs": runs}, {first: 0.002, small: 0.001}).axes
    assert list(by_latency.lines[0].get_xdata()) == [0.001, 0.002]


def test_an_unfinished_study_has_the_figures_that_it_has_runs_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [{"study": "objectives", "row": "refinement", "seed": 1, "figures": {"top1_percent": 70.0}}]
    (tmp_path / "ablation.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr("sys.argv", ["plots", str(tmp_path / "ablation.json"), str(tmp_path / "figures")])
    plots.main()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"objectives.svg"}
    (by_parameters, _) = plots.sizes({"runs": [sized("feature_cosine", 1, 74.0)]}, {}).axes
    assert [len(line.get_xdata()) for line in by_parameters.lines[:2]] == [1, 0]  # of labels, none


@pytest.mark.slow
def test_figures_show_every_seed_and_give_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top1 = {"refinement": 70.0, "comkd": 71.0}
    finished = [
        {"study": study, "row": f"{name}{end}", "seed": seed, "figures": {"top1_percent": score + seed}}
        for study, end in (("objectives", ""), ("images", "_1000_equal_epochs"), ("images", "_1000_equal_steps"))
        for name, score in top1.items()
        for seed in (2, 1)
    ]
    finished += [sized("feature_cosine", 1, 74.0), sized("labels", 1, 70.0)]
    (tmp_path / "ablation.json").write_text(json.dumps({"runs": finished}))
    written = []
    for folder in ("once", "again"):
        monkeypatch.setattr("sys.argv", ["plots", str(tmp_path / "ablation.json"), str(tmp_path / folder)])
        plots.main()
        written.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"objectives.svg", "images.svg", "size.svg"}
    scores = plots.scores_of({"runs": finished}, "objectives")
    assert scores == {"refinement": [71.0, 72.0], "comkd": [72.0, 73.0], "feature_cosine": [74.0], "labels": [70.0]}
    points = [line for line in plots.objectives(scores).axes[0].lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in points] == list(scores.values())
    (refinement, _) = plots.images(plots.scores_of({"runs": finished}, "images"), scores).axes[0].lines
    assert list(refinement.get_xdata()) == [1000, 50_000]
    assert list(refinement.get_ydata()) == [71.5, 71.5]
