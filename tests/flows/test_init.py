"""A proposed recipe: it loads, it says why, and it can be trained."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from comkd_cli.data.sources import open_source
from comkd_cli.errors import DataError, ModelError, WriteError
from comkd_cli.flows import distill
from comkd_cli.flows.init import Request, propose, proposed_schedule, write_recipe
from comkd_cli.models.choice import Limit
from comkd_cli.recipe import Recipe, load_recipe
from comkd_cli.recipe.model import FullAdapt, PromptSrcAdapt
from tests import warm
from tests.outlined import outline_once

WriteImage = Callable[..., Path]


@pytest.fixture(autouse=True)
def this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights in the cache and no GPU, whatever the tests run on."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outline_once(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pets(tmp_path: Path, write_image: WriteImage) -> Path:
    for c, name in enumerate(("cat", "dog")):
        for i in range(20):
            write_image(tmp_path / f"pets/train/{name}/{i}.jpg", seed=100 * c + i)
        write_image(tmp_path / f"pets/test/{name}/0.jpg", seed=100 * c + 50)
    return Path("pets")


def loaded(text: str) -> Recipe:
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe("recipe.yaml")


@pytest.mark.slow
def test_a_labelled_folder_gets_a_teacher_by_prompts_and_a_student_a_tenth_of_it(pets: Path) -> None:
    proposal = propose(Request(pets))
    recipe = loaded(proposal.text)
    assert (recipe.data.folder, recipe.data.classes, recipe.data.template) == ("pets", None, "a photo of a {}.")
    assert (recipe.teacher.arch, recipe.teacher.weights) == ("ViT-B-16-quickgelu", "openai")
    assert isinstance(recipe.teacher.adapt, PromptSrcAdapt)
    assert recipe.teacher_cache is not None
    outline = distill.outline(recipe, 2)
    assert outline.student_image_tower_parameters == proposal.student.parameters
    assert outline.student_image_tower_parameters * 10 <= outline.teacher_image_tower_parameters
    assert recipe.evaluate_every_epochs == recipe.optim.epochs // 10
    assert len(open_source(recipe.data, Path("data")).train) == 40


@pytest.mark.slow
def test_without_downloads_the_teacher_learns_from_the_labels(pets: Path) -> None:
    recipe = loaded(propose(Request(pets, download=False)).text)
    assert isinstance(recipe.teacher.adapt, FullAdapt)
    assert not recipe.teacher.has_weights
    assert recipe.teacher_cache is None
    vision = (recipe.student.config or {})["vision_cfg"]
    assert vision["timm_model_pretrained"] is False
    assert vision["image_size"] == 64


@pytest.mark.slow
def test_an_unlabelled_folder_keeps_the_teacher_zero_shot(tmp_path: Path, write_image: WriteImage) -> None:
    for i in range(10):
        write_image(tmp_path / f"my photos/{i}.jpg", seed=i, size=(300, 400))
    Path("c.txt").write_bytes('\ufeffred "fox", the\r\nno\r\n'.encode())
    recipe = loaded(propose(Request(Path("my photos"), Path("c.txt"), Limit(parameters=3_000_000))).text)
    assert (recipe.data.folder, recipe.data.classes, recipe.teacher.adapt.method) == ("my photos", "c.txt", "none")
    assert open_source(recipe.data, Path("data")).class_names == ('red "fox", the', "no")
    assert recipe.evaluate_every_epochs == recipe.optim.epochs // 10
    with pytest.raises(ModelError):
        propose(Request(Path("my photos"), Path("c.txt"), download=False))


def test_a_class_in_test_alone_is_written_out_and_not_adapted_to(pets: Path, write_image: WriteImage) -> None:
    write_image(Path("pets/test/1e3/0.jpg"), seed=9)
    proposal = propose(Request(pets))
    recipe = loaded(proposal.text)
    assert recipe.data.classes == ("1e3", "cat", "dog")
    assert recipe.teacher.adapt.method == "none"
    assert "No training images of: 1e3" in proposal.text
    assert open_source(recipe.data, Path("data")).class_names == ("1e3", "cat", "dog")


def test_what_the_folder_lacks_and_holds_twice_stands_in_the_recipe(pets: Path) -> None:
    Path("pets/test/cat/leak.jpg").write_bytes(Path("pets/train/cat/0.jpg").read_bytes())
    Path("pets/train/dog/other.jpg").write_bytes(Path("pets/train/cat/1.jpg").read_bytes())
    text = " ".join(propose(Request(pets)).text.replace("#", "").split())
    assert "1 test images are also in train/" in text
    assert "1 copy of another image has another label" in text
    for path in Path("pets/test").rglob("*.jpg"):
        path.unlink()
    assert "no test images" in propose(Request(pets)).text


ODD = ["no", "a: b # c", "- x", 'it\'s "odd"', "line\nbreak", "狐", "~", "1e3", " a", "x\x85y"]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_of_any_name_is_found_again(pets: Path, name: str) -> None:
    pets.rename(name)
    recipe = loaded(propose(Request(Path(name), download=False)).text)
    assert len(open_source(recipe.data, Path("data")).train) == 40


def test_a_folder_whose_name_is_no_text_is_refused_with_the_remedy(pets: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    try:
        pets.rename(name)
    except OSError:
        pytest.skip("the file system takes UTF-8 names alone")
    with pytest.raises(DataError) as caught:
        propose(Request(Path(name), download=False))
    assert (caught.value.path, caught.value.remedy) == ("caf\\udce9", "rename it")


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    write_recipe(tmp_path / "new" / "recipe.yaml", "first")
    with pytest.raises(WriteError) as caught:
        write_recipe(tmp_path / "new" / "recipe.yaml", "second")
    assert (caught.value.path, "--out" in str(caught.value.remedy)) == (tmp_path / "new" / "recipe.yaml", True)
    assert (tmp_path / "new" / "recipe.yaml").read_text() == "first"
    with pytest.raises(WriteError):
        write_recipe(tmp_path / "new" / "recipe.yaml" / "below a file.yaml", "")


@pytest.mark.parametrize("images", [2, 3, 7, 8, 20, 63, 64, 100, 500, 1_023, 1_024, 50_000, 1_300_000])
def test_the_schedule_follows_its_rule(images: int) -> None:
    schedule = proposed_schedule(images)
    batch, epochs = schedule.batch_size, schedule.epochs
    assert 2 <= batch <= min(128, images)
    assert schedule.steps_per_epoch == images // batch
    assert 5 <= epochs <= 100
    if images >= 64:
        assert schedule.steps_per_epoch >= 8
        assert batch == 128 or images // (2 * batch) < 8
    if 5 < epochs < 100:
        assert 5000 <= epochs * schedule.steps_per_epoch < 5000 + schedule.steps_per_epoch


@pytest.mark.slow
def test_the_latency_is_measured_and_the_recipe_trains_as_it_is(pets: Path, tmp_path: Path) -> None:
    environment = {"HF_HUB_CACHE": str(tmp_path / "no cache"), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = warm.run(*arguments, cwd=tmp_path, env=environment, hub=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("init", "pets", "--no-download", "--max-latency", "10s")
    assert "ms on one thread" in said
    assert "2 epochs of 8 steps" not in said
    assert "new" in run("distill", "recipe.yaml", "--dry-run").split()
    short = ["--set", "optim.epochs=1", "--set", "optim.warmup_epochs=0", "--set", "teacher.adapt.epochs=1"]
    run("distill", "recipe.yaml", *short, "--set", "data.workers=0")
    assert (tmp_path / "runs/recipe/pets/seed1/student.pt").is_file()
