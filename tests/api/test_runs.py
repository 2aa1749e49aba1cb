"""The verbs as functions: what they return, and that they are the verbs of the command line."""

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

import comkd_cli as comkd
from comkd_cli.errors import CheckpointError, MisuseError, RecipeError
from tests import tiny

pytestmark = [pytest.mark.usefixtures("few_digits"), pytest.mark.slow]


def test_a_recipe_is_distilled_once_and_its_student_is_scored_and_exported(tmp_path: Path) -> None:
    events: list[comkd.Event] = []
    runs = tmp_path / "runs"
    settings = {"optim.epochs": 1, "seed": 3}
    run = comkd.distill(tiny.recipe(), settings=settings, name="short", runs=runs, report=events.append)
    assert run.file == runs / "short/digits/seed3/student.pt"
    assert (run.recipe.optim.epochs, run.recipe.seed, run.was_finished) == (1, 3, False)
    epochs = [event for event in events if isinstance(event, comkd.Epoch)]
    assert len(epochs) == 2 + 1  # of the teacher and of the student
    again = comkd.distill(run.recipe, name="short", runs=runs)
    assert again == comkd.Distilled(run.file, run.recipe, run.metrics, was_finished=True)
    with pytest.raises(CheckpointError):
        comkd.distill(run.recipe, settings={"optim.epochs": 2}, name="short", runs=runs)

    results = comkd.evaluate(run.file, runs=runs, out=tmp_path / "scores")
    student, teacher = results.records
    assert (student.role, teacher.role, student.images) == ("student", "teacher", tiny.TEST)
    assert student.top1_percent == pytest.approx(run.metrics["test_top1_percent"])
    assert (tmp_path / "scores/results.json").is_file()
    loaded = run.load(device="cpu")
    images, labels = _test_images(loaded)
    right = loaded.logits(images).argmax(dim=1) == labels
    assert 100 * float(right.float().mean()) == pytest.approx(student.top1_percent)

    bundle = comkd.export(run.file, options=comkd.ExportOptions(check_images=20))
    assert (bundle.folder, bundle.precisions, dict(bundle.failed)) == (run.folder / "bundle", ("fp32",), {})
    assert bundle.graph().is_file()


def _test_images(student: comkd.LoadedStudent) -> tuple[torch.Tensor, torch.Tensor]:
    from comkd_cli.data.digits import digits_source

    images = digits_source().test
    assert images is not None
    assert images.labels is not None
    prepared = [student.transform(images.open(index)) for index in range(len(images))]
    return torch.stack(prepared), torch.tensor(images.labels)


def test_a_precision_of_its_own_in_each_run(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        settings = {"optim.epochs": 1, "teacher.adapt.epochs": 1, "precision": precision}
        run = comkd.distill(tiny.recipe(), settings=settings, name=precision, runs=tmp_path)
        assert run.recipe.precision == precision


def test_recipes_of_every_kind_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comkd_cli.api.runs import _name, _recipe

    with (tmp_path / "own.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump({"extends": "digits", "seed": 5}, stream)
    monkeypatch.chdir(tmp_path)
    settings = {"optim.learning_rate": 1e-5, "student.weights": Path("w.pt"), "about": "yes: no"}
    kinds = [tmp_path / "own.yaml", "own.yaml", {"extends": "digits", "seed": 5}, _recipe("own.yaml", {})]
    found = [_recipe(kind, settings) for kind in kinds]
    assert all(recipe == found[0] for recipe in found)
    assert (found[0].optim.learning_rate, found[0].student.weights, found[0].about) == (1e-5, "w.pt", "yes: no")
    assert [_name(kind) for kind in kinds] == ["own", "own", "recipe", "recipe"]
    with pytest.raises(RecipeError):
        _recipe({"extends": "digits", "optim": {"epochs": 0}}, {})
    with pytest.raises(MisuseError) as caught:
        _recipe("digits", {"optim.epochs": torch.tensor(3)})
    assert caught.value.field == "optim.epochs"
