"""What counts as the same run, teacher, cache and features: settings and image contents, never names alone."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from comkd_cli.data.digits import digits_source
from comkd_cli.data.sources import INDEX, open_source
from comkd_cli.errors import CheckpointError
from comkd_cli.events import Event, Notice
from comkd_cli.flows import adapt, distill
from comkd_cli.recipe import parse_recipe
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny


def write_digits(folder: Path, first: int = 0, classes: str = "01") -> Path:
    """train/ and test/ with a sub-folder for each of two classes, of images of one size on disk."""
    digits = digits_source()
    for split, images in (("train", digits.train), ("test", digits.test)):
        assert images is not None
        assert images.labels is not None
        for label, name in enumerate(classes):
            path = folder / split / name
            path.mkdir(parents=True)
            chosen = [i for i, found in enumerate(images.labels) if found == label][first : first + 6]
            for number, index in enumerate(chosen):
                images.open(index).save(path / f"{number}.bmp")
    return folder


def make(folder: Path, runs: Path, name: str = "it", **changes: Any) -> tuple[distill.Run, adapt.Stage1]:
    fields = {"data": {"folder": str(folder), "workers": 0}, "optim": {**tiny.OPTIM, "epochs": 1, "batch_size": 4}}
    recipe = parse_recipe(tiny.recipe(**{**fields, **changes}))
    source = open_source(recipe.data, Path("data"), runs)
    stage = adapt.stage_1(recipe, source, Path("data"), runs)
    return distill.Run(recipe, name, source, runs, stage.contents, stage.key), stage


def train(run: distill.Run, stage: adapt.Stage1) -> Path:
    accelerator = make_accelerator("fp32")
    return distill.distill(
        run,
        adapt.TeacherPreparation(stage, accelerator, lambda event: None, "again"),
        accelerator,
        lambda event: None,
        "again",
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> distill.Run:
    home = tmp_path_factory.mktemp("home")
    run, stage = make(write_digits(home / "v1/pair"), home / "runs")
    train(run, stage)
    return run


def refusal(run: distill.Run) -> str:
    """What the run has differently from the finished one."""
    with pytest.raises(CheckpointError) as caught:
        distill.finished(run)
    assert caught.value.path == run.student_file
    assert "--fresh" in str(caught.value.remedy)
    return str(caught.value.found)


def folder_of(run: distill.Run) -> Path:
    return Path(str(run.recipe.data.folder))


def test_the_same_recipe_and_images_are_finished_also_where_the_folder_was_moved(
    done: distill.Run, tmp_path: Path
) -> None:
    assert distill.finished(make(folder_of(done), done.runs)[0])
    moved = write_digits(tmp_path / "elsewhere/pair")
    again, stage = make(moved, done.runs)
    assert distill.finished(again)
    assert stage.file.is_file()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optim": {**tiny.OPTIM, "name": "sgd", "epochs": 1, "batch_size": 4}}, "optim.name: adamw in the finished"),
        ({"loss": {"refinement": {"weight": 10.0}, "if_align": None}}, "loss.if_align: set in the finished run, null"),
        ({"teacher": {"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 3}}}, "teacher.adapt.epochs: 2 in"),
        ({"augment": {"min_scale": 0.7, "flip": True}}, "augment.flip: false in the finished run, true now"),
    ],
    ids=["optimiser", "loss", "teacher", "augment"],
)
def test_another_setting_is_refused_by_its_name(done: distill.Run, changes: dict[str, Any], named: str) -> None:
    assert named in refusal(make(folder_of(done), done.runs, **changes)[0])


def test_a_folder_of_the_same_name_with_other_images_is_another_run_and_another_teacher(
    done: distill.Run, tmp_path: Path
) -> None:
    run, stage = make(write_digits(tmp_path / "v2/pair", first=6), done.runs)
    assert "the contents of the training images changed" in refusal(run)
    assert not stage.file.exists()


def test_a_folder_whose_classes_were_exchanged_is_another_run_and_another_teacher(
    done: distill.Run, tmp_path: Path
) -> None:
    run, stage = make(write_digits(tmp_path / "v3/pair", classes="10"), done.runs)
    assert "changed" in refusal(run)
    assert not stage.file.exists()


def test_one_image_that_was_overwritten_in_place_is_noticed(done: distill.Run, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "pair")
    assert distill.finished(make(folder, done.runs)[0])
    path = folder / "train/1/5.bmp"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert "the contents of the training images changed" in refusal(make(folder, done.runs)[0])


@pytest.mark.slow
def test_other_test_images_are_the_same_run_unless_they_select_the_epoch(done: distill.Run, tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "pair")
    Image.new("RGB", (8, 8)).save(folder / "test/0/0.bmp")
    assert distill.finished(make(folder, done.runs)[0])
    runs = tmp_path / "runs"
    train(*make(folder, runs, selection="promptkd"))
    assert distill.finished(make(folder, runs, selection="promptkd")[0])
    Image.new("RGB", (8, 8), "white").save(folder / "test/0/0.bmp")
    assert "the contents of the test images" in refusal(make(folder, runs, selection="promptkd")[0])


@pytest.mark.slow
def test_images_compared_by_size_and_time_are_not_read_and_differ_from_those_compared_by_contents(
    done: distill.Run, tmp_path: Path
) -> None:
    data = {"folder": str(folder_of(done)), "workers": 0, "fingerprint": "size_and_time"}
    run, stage = make(folder_of(done), tmp_path / "runs", data=data)
    train(run, stage)
    assert distill.finished(make(folder_of(done), tmp_path / "runs", data=data)[0])
    assert not (tmp_path / "runs" / INDEX).exists()
    assert "data.fingerprint: contents in the finished run" in refusal(make(folder_of(done), done.runs, data=data)[0])


def test_a_student_of_a_version_without_recorded_contents_is_compared_by_what_it_says(
    done: distill.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = torch.load(done.student_file, weights_only=True)
    del old["identity_parts"]
    run, _ = make(folder_of(done), tmp_path)
    run.student_file.parent.mkdir(parents=True)
    torch.save(old, run.student_file)
    events: list[Event] = []
    assert distill.finished(run, events.append)
    assert any(isinstance(event, Notice) and "did not record image contents" in event.text for event in events)
    other, _ = make(folder_of(done), tmp_path, augment={"min_scale": 0.5})
    assert "augment.min_scale: 0.7 in the finished run, 0.5 now" in refusal(other)
    prompt = replace(run, source=replace(run.source, template="a drawing of a {}."))
    assert "data.template: a photo of a {}. in the finished run" in refusal(prompt)


def test_a_teacher_that_learns_prompts_is_known_by_the_images_it_learns_from_alone(
    weights: Path, tmp_path: Path
) -> None:
    adapt_settings = {"method": "promptsrc", "shots": 2, "epochs": 1, "tokens": 2, "vision_depth": 1, "text_depth": 1}
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": adapt_settings}
    folder = write_digits(tmp_path / "pair")
    _, stage = make(folder, tmp_path / "runs", teacher=teacher)
    key = stage.key
    drawn = set(stage.prompt_source(stage.settings.adapt).train.keys)  # type: ignore[arg-type]
    unused = next(key for key in stage.source.train.keys if key not in drawn)
    Image.new("RGB", (8, 8)).save(folder / "train" / unused)
    assert make(folder, tmp_path / "runs", teacher=teacher)[1].key == key
    Image.new("RGB", (8, 8)).save(folder / "train" / min(drawn))
    assert make(folder, tmp_path / "runs", teacher=teacher)[1].key != key


def test_a_backbone_file_that_changed_makes_another_teacher(
    weights: Path, tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    for number in range(4):
        write_image(tmp_path / f"pictures/{number}.png", seed=number)
    data = {"folder": str(tmp_path / "pictures"), "classes": ["cat", "dog"], "workers": 0, "holdout_percent": 0}
    backbone, prompts = tmp_path / "backbone.pt", tmp_path / "released.pt"
    backbone.write_bytes(weights.read_bytes())
    prompts.write_bytes(weights.read_bytes())
    teacher = {
        "config": tiny.CLIP,
        "weights": str(prompts),
        "format": "promptsrc",
        "backbone_weights": str(backbone),
    }
    run, stage = make(tmp_path, tmp_path / "runs", data=data, teacher=teacher)
    backbone.write_bytes(b"others")
    other, other_stage = make(tmp_path, tmp_path / "runs", data=data, teacher=teacher)
    assert stage.key != other_stage.key
    assert other.identity.differences(run.identity.parts, "it") == ["the file in teacher.backbone_weights changed"]


def test_a_cache_of_which_a_single_image_changed_is_another_cache(weights: Path, tmp_path: Path) -> None:
    teacher = {"config": tiny.CLIP, "weights": str(weights)}
    folders = []
    for changed in (False, True):
        folder = write_digits(tmp_path / str(changed) / "pair")
        if changed:
            Image.new("RGB", (8, 8)).save(folder / "train/0/3.bmp")
        run, stage = make(folder, tmp_path / "runs", teacher=teacher, teacher_cache={"views": 1})
        ready = adapt.TeacherPreparation(stage, make_accelerator("fp32"), lambda event: None, "again").prepare()
        cache = distill.open_cache(run, ready, lambda event: None)
        assert cache is not None
        folders.append(cache.folder)
    assert folders[0] != folders[1]
