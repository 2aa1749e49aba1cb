"""The changes that CONTRIBUTING.md shows, made in a copy of the package and run; and what it says of the checks."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.model import Model
from tests import tiny, warm

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = ("A dataset", "A loss term", "A backbone", "An export precision")
LONGEST_EXAMPLE = 30  # lines that a contributor writes


def blocks(section: str) -> list[tuple[str, str]]:
    """The fenced blocks of a section, each with its language."""
    body = TEXT.split(f"### {section}\n")[1].split("\n### ")[0].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", body, re.S)


def replace_once(below: Path, old: str, new: str) -> None:
    """Replace whole lines that occur exactly once in a file or in the files of a folder."""
    files = [below] if below.is_file() else sorted(below.rglob("*.py"))
    texts = {file: f"\n{file.read_text(encoding='utf-8')}" for file in files}
    found = [file for file, text in texts.items() for _ in range(text.count(f"\n{old}\n"))]
    assert len(found) == 1, f"{below}: found {len(found)} times:\n{old}"
    (file,) = found
    file.write_text(texts[file].replace(f"\n{old}\n", f"\n{new}\n")[1:], encoding="utf-8")


def apply(section: str, folder: Path) -> None:
    """Make the change of a section: files that begin with `# NAME`, and diffs without line numbers."""
    for language, block in blocks(section):
        if language == "diff":
            for hunk in block.split("@@ ")[1:]:
                place, *lines = hunk.splitlines()
                old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
                new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
                replace_once(folder / place, old, new)
        else:
            name, text = block.removeprefix("# ").split("\n", 1)
            (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def change(tmp_path: Path) -> Callable[[str], Path]:
    """Makes the change of a section in a copy of the package, and returns the folder of the copy."""

    def make(section: str) -> Path:
        for name in ("comkd_cli", "recipes"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        apply(section, tmp_path)
        return tmp_path

    return make


def python(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of a folder."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def comkd(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return warm.run(*arguments, cwd=folder, package=folder, fresh=["comkd_cli"])


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_is_short(section: str) -> None:
    written = 0
    for language, block in blocks(section):
        lines = block.splitlines()
        written += sum(line.startswith("+") for line in lines) if language == "diff" else len(lines) - 1
    assert 0 < written < LONGEST_EXAMPLE


@pytest.mark.slow
def test_a_dataset_of_the_catalog_is_checked_and_planned(change: Callable[[str], Path]) -> None:
    folder = change("A dataset")
    images = folder / "data/flags/images"
    images.mkdir(parents=True)
    lists: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for label, colour in enumerate(("red", "blue")):
        for part in ("train", "test"):
            Image.new("RGB", (16, 16), colour).save(images / f"{colour}_{part}.png")
            lists[part].append((f"{colour}_{part}.png", label, colour))
    (images.parent / "split_flags.json").write_text(json.dumps(lists))
    checked = comkd(folder, "datasets", "check", "flags", "--deep", "--json")
    assert checked.returncode == 0, checked.stderr
    (entry,) = json.loads(checked.stdout)
    assert (entry["state"], entry["train"], entry["test"], entry["unreadable_images"]) == ("ready", 2, 2, 0)
    planned = comkd(folder, "distill", "digits", "--dataset", "flags", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "flags: 2 training images, 2 test images, 2 classes" in planned.stdout


@pytest.mark.slow
def test_a_loss_term_is_trained_and_reported(change: Callable[[str], Path]) -> None:
    folder = change("A loss term")
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), folder / "clip.pt")
    plain = tiny.recipe(
        teacher={"config": tiny.CLIP, "weights": "clip.pt"},
        loss={"refinement": None, "if_align": {"weight": 0.01}, "edu_attention": None},
        optim={**tiny.OPTIM, "epochs": 1},
    )
    with (folder / "tiny.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(plain, stream)
    done = comkd(folder, "distill", "tiny.yaml", "--set", "loss.feature_l1.weight=5")
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "runs/tiny/digits/seed1/metrics.jsonl").read_text().splitlines()[-1])
    assert figures["feature_l1"] > 0
    assert figures["loss"] == pytest.approx(figures["feature_l1"] + figures["if_align"], rel=1e-4)
    assert figures["feature_l1_gradient_share"] + figures["if_align_gradient_share"] == pytest.approx(1)


@pytest.mark.slow
def test_a_backbone_is_planned_by_its_recipe(change: Callable[[str], Path]) -> None:
    folder = change("A backbone")
    planned = comkd(folder, "distill", "micro.yaml", "--dry-run", "--set", "loss.edu_attention=null")
    assert planned.returncode == 0, planned.stderr
    width, patches, teacher = 32, (32 // 8) ** 2, 64
    embedding = 3 * 8 * 8 * width + width + (1 + 1 + patches) * width  # patches, class token, positions
    block = 2 * 2 * width + (4 + 8) * width**2 + (3 + 1 + 4 + 1) * width  # norms, weights and biases of both halves
    projector = width * teacher + teacher + 2 * teacher + teacher**2 + teacher
    expected = embedding + 2 * block + 2 * width + projector
    assert f"image tower {expected:,} parameters" in " ".join(planned.stdout.split())


CONVERT = """
from pathlib import Path
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from comkd_cli.bundles.fp16_weights import to_fp16_weights
from comkd_cli.bundles.runner import run_graph

random = np.random.default_rng(0)
weights = random.normal(size=(64, 32)).astype(np.float32)
value = helper.make_tensor_value_info
graph = helper.make_graph(
    [helper.make_node("MatMul", ["image", "weights"], ["logits"])],
    "product",
    [value("image", TensorProto.FLOAT, ["batch", 64])],
    [value("logits", TensorProto.FLOAT, ["batch", 32])],
    [numpy_helper.from_array(weights, "weights")],
)
source, target = Path("whole.onnx"), Path("half.onnx")
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
to_fp16_weights(source, target)
assert target.stat().st_size < 0.6 * source.stat().st_size
images = random.normal(size=(5, 64)).astype(np.float32)
found = run_graph(target, {"all": images})["all"]
np.testing.assert_allclose(found, images @ weights.astype(np.float16).astype(np.float32), rtol=1e-4, atol=1e-5)
assert np.abs(found - images @ weights).max() > 1e-4
print("converted")
"""


@pytest.mark.slow
def test_an_export_precision_runs_in_onnxruntime(change: Callable[[str], Path]) -> None:
    folder = change("An export precision")
    (folder / "convert.py").write_text(CONVERT)
    done = python(folder, "convert.py")
    assert (done.returncode, done.stdout) == (0, "converted\n"), done.stderr


def test_the_hooks_are_the_commands_of_make_check() -> None:
    hooks = YAML(typ="safe").load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0].splitlines()[1:]
    assert [hook["entry"] for hook in hooks] == [line.strip().removeprefix("$(BIN)/") for line in recipe]
    assert {hook["language"] for hook in hooks} == {"system"}


def test_the_overview_names_every_package_and_files_that_exist() -> None:
    overview = TEXT.split("imports only point down.\n")[1].split("\n\n")[0]
    packages = dict(re.findall(r"^ +(\w+) .* (\S+\.py)$", overview, re.M))
    package = ROOT / "comkd_cli"
    assert set(packages) == {path.parent.name for path in package.glob("*/__init__.py")}
    for name, file in packages.items():
        assert (package / name / file).is_file(), f"{name}/{file}"
