"""Every recipe that comes with comkd: valid, outlined without a download, and trained for two steps, reduced."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from comkd_cli.cli.app import main
from comkd_cli.data.digits import digits_source
from comkd_cli.data.sources import open_source
from comkd_cli.flows import adapt, distill
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.models.backbones import build_clip, known_architectures
from comkd_cli.recipe import check_recipes, load_recipe, parse_recipe
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.loading import bundled_recipes
from comkd_cli.recipe.model import Model
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny
from tests.flows.test_suite import fill

NAMES = sorted(bundled_recipes())
PAPER = [name for name in NAMES if name not in ("digits", "labels_only", "cifar10")]


def test_all_are_valid_for_every_data_set_that_they_name() -> None:
    assert check_recipes(NAMES) == {}


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_and_knows_its_architectures(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about
    for model in (recipe.teacher, recipe.student):
        assert model.arch is None or model.arch in known_architectures()


@pytest.mark.parametrize("dataset", [*CATALOG])
def test_the_weight_of_the_refinement_is_promptkds_for_each_data_set(dataset: str) -> None:
    recipe = load_recipe("vitl_to_vitb", [f"data.dataset={dataset}"])
    expected = 200 if dataset in ("fgvc_aircraft", "oxford_flowers", "dtd") else 1000
    assert recipe.loss.refinement is not None
    assert recipe.loss.refinement.weight == expected


@pytest.mark.parametrize("name", ["vitl_to_vitb_cross", "vitl_to_vitb_dg"])
@pytest.mark.parametrize("dataset", [*CATALOG])
def test_across_data_sets_and_domains_refinement_weighs_the_same_everywhere(name: str, dataset: str) -> None:
    """PromptKD's cross-dataset and domain generalisation scripts have no other weight for any data set."""
    recipe = load_recipe(name, [f"data.dataset={dataset}"])
    assert recipe.loss.refinement is not None
    assert recipe.loss.refinement.weight == 1000


def differences(first: Any, second: Any, at: str = "") -> set[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        return {
            d
            for key in first.keys() | second.keys()
            for d in differences(first.get(key), second.get(key), f"{at}.{key}")
        }
    return set() if first == second else {at.lstrip(".")}


@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("promptkd", {"loss.if_align", "loss.edu_attention"}),
        ("ablation_no_if_align", {"loss.if_align"}),
        ("ablation_no_edu_attention", {"loss.edu_attention"}),
        ("ablation_candidates", {"loss.edu_attention.memory"}),
    ],
)
def test_an_ablation_differs_from_the_papers_recipe_in_what_it_is_named_for(name: str, differing: set[str]) -> None:
    paper, other = (load_recipe(which).model_dump(mode="json") for which in ("vitl_to_vitb", name))
    assert differences(paper, other) - {"about"} == differing


def test_labels_only_is_the_student_and_teacher_of_digits_with_another_loss() -> None:
    digits, alone = (load_recipe(which) for which in ("digits", "labels_only"))
    changed = differences(digits.model_dump(mode="json"), alone.model_dump(mode="json")) - {"about"}
    assert {path.split(".")[0] for path in changed} == {"loss"}
    assert not alone.loss.needs_teacher
    assert alone.loss.edu_attention is None


def test_the_papers_settings() -> None:
    recipe = load_recipe("vitl_to_vitb")
    adapted = recipe.teacher.adapt
    assert (adapted.shots, adapted.tokens, adapted.vision_depth, adapted.text_depth) == (16, 4, 9, 9)  # type: ignore[union-attr]
    assert (adapted.learning_rate, adapted.batch_size, adapted.epochs) == (0.005, 8, 20)  # type: ignore[union-attr]
    optim = recipe.optim
    assert (optim.name, optim.learning_rate, optim.batch_size, optim.epochs) == ("sgd", 0.005, 8, 20)
    cross = load_recipe("vitl_to_vitb_cross")
    assert (cross.teacher.adapt.vision_depth, cross.student.prompts.depth) == (3, 3)  # type: ignore[union-attr]
    assert cross.teacher.adapt.data.dataset == "imagenet"  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_its_models_are_outlined_without_weights_or_images(name: str) -> None:
    outline = distill.outline(load_recipe(name), 10)
    # OpenAI's ViT-L/14 at 224 pixels: 428 M parameters, 304 M of them in the image tower, 81 G multiply-adds.
    assert 427e6 < outline.teacher_parameters < 429e6
    assert 303e6 < outline.teacher_image_tower_parameters < 305e6
    assert 80e9 < outline.teacher_multiply_adds < 84e9
    assert outline.student_image_tower_parameters < outline.teacher_image_tower_parameters / 3
    assert outline.student_multiply_adds < outline.teacher_multiply_adds / 4
    full = load_recipe(name).student.train == "full"
    assert (outline.student_trainable_parameters == outline.student_image_tower_parameters) == full


def planned(*arguments: object) -> str:
    """What `comkd distill ARGUMENTS --dry-run` prints, without its line breaks."""
    result = CliRunner().invoke(main, ["distill", *map(str, arguments), "--dry-run"])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries, which the command hides
def test_the_command_prints_them_with_no_network_and_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("an address was looked up"))
    monkeypatch.setenv("COMKD_DATA", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    printed = planned("vitl_to_vitb")
    for word in ("427,", "G multiply-adds", "trainable", "was not found"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries, which the command hides
def test_a_dry_run_tells_of_each_kind_of_images_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder: cifar10, data/cifar10" in planned("cifar10")
    only_target = tmp_path / "data"
    fill(CATALOG["eurosat"], only_target)
    cross = planned("vitl_to_vitb_cross", "--data-root", only_target)
    assert "12 training images" in cross
    assert "imagenet was not found" in cross


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A CLIP of the least size that every recipe's kind of teacher and student can be had from."""
    folder = tmp_path_factory.mktemp("small")
    torch.save(build_clip(Model(config=tiny.CLIP), seed=1).model.state_dict(), folder / "clip.pt")
    return {"config": tiny.CLIP, "weights": str(folder / "clip.pt")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EuroSAT, ImageNet and ImageNetV2 with a few real pictures each."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("eurosat", "imagenet", "imagenetv2"):
        fill(CATALOG[name], folder)
    pictures = digits_source()
    for split, images in (("train", pictures.train), ("test", pictures.test)):
        for index in range(12):
            assert images is not None
            path = folder / "cifar10" / split / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.open(index).save(path)
            (folder / "photos").mkdir(exist_ok=True)
            images.open(index).save(folder / "photos" / f"{split}{index}.png")
    (folder / "classes.txt").write_text("zero\none\n", encoding="utf-8")
    return folder


def reduced_run(name: str, runs: Path, root: Path, small: dict[str, Any]) -> distill.Run:
    """A recipe with small models and one epoch of small batches, trained."""
    plain = load_recipe(name).model_dump(mode="json")
    reduced = {"epochs": 1, "batch_size": 84 if plain["data"]["dataset"] == "digits" else 6}
    plain["optim"] |= reduced
    if plain["teacher"]["adapt"]["method"] != "none":
        plain["teacher"]["adapt"] |= reduced
    for depth in ("vision_depth", "text_depth"):
        if depth in plain["teacher"]["adapt"]:
            plain["teacher"]["adapt"][depth] = 1
    student = plain["student"]
    if student["train"] == "prompts":
        student["prompts"] = {"tokens": 4, "depth": 2}
    if name in PAPER:
        plain["teacher"] |= {"arch": None, **small}
        convolutional = "MobileCLIP" in str(student["arch"]) or "mobilenet" in json.dumps(student["config"])
        tower = {"image_size": 32, "timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear"}
        config = {"embed_dim": 16, "vision_cfg": tower} if convolutional else tiny.CLIP
        weights = None if student["train"] == "full" else small["weights"]
        plain["student"] |= {"arch": None, "config": config, "weights": weights}
    recipe = parse_recipe(plain)
    source = open_source(recipe.data, root)
    stage = adapt.stage_1(recipe, source, root, runs)
    run = distill.Run(recipe, name, source, runs, stage.contents, stage.key)
    accelerator = make_accelerator("fp32")
    teacher = adapt.TeacherPreparation(stage, accelerator, lambda event: None, "")
    distill.distill(run, teacher, accelerator, lambda event: None, "")
    return run


Reduced = Callable[[str], distill.Run]


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory, root: Path, small: dict[str, Any], few_digits: None) -> Reduced:
    """Trains a recipe at reduced size, once for all tests; recipes with the same teacher share it."""
    runs = tmp_path_factory.mktemp("runs")
    return cache(lambda name: reduced_run(name, runs, root, small))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_at_reduced_size(name: str, reduced: Reduced) -> None:
    run = reduced(name)
    (line,) = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert distill.plan(run).steps_per_epoch >= 2
    assert json.loads(line)["loss"] > 0


@pytest.mark.slow
def test_a_student_of_imagenets_teacher_is_scored_as_cross_dataset_and_another_as_base_to_novel(
    reduced: Reduced, root: Path
) -> None:
    protocols = ("cross-dataset", "base-to-novel")
    found = {}
    for name in ("vitl_to_vitb", "vitl_to_vitb_cross"):
        run = reduced(name)
        bench = Bench(torch.device("cpu"), root, lambda event: None, protocols=protocols)
        records = evaluate(str(run.student_file), run.runs, bench).records
        found[name] = {record.protocol for record in records if record.role == "student"}
    assert found == {"vitl_to_vitb": {"base-to-novel"}, "vitl_to_vitb_cross": set(protocols)}


@pytest.mark.slow
def test_a_student_of_a_variant_learns_from_its_unlabelled_test_images(reduced: Reduced, root: Path) -> None:
    run = reduced("vitl_to_vitb_dg")
    assert run.source.train.labels is None
    assert run.source.test is not None
    assert run.source.train.keys == run.source.test.keys
    bench = Bench(torch.device("cpu"), root, lambda event: None, protocols=("domain-generalization",))
    records = evaluate(str(run.student_file), run.runs, bench).records
    assert {(record.dataset, record.protocol) for record in records} == {("imagenetv2", "domain-generalization")}
