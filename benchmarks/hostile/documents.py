"""Hostile texts: recipes, settings, split files, class lists, labels, prompts, results, curves."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.hostile import mutations
from comkd_cli.data.class_names import clean_class_names, read_class_names
from comkd_cli.data.label_file import read_label_file
from comkd_cli.data.prompts import read_prompts
from comkd_cli.data.split_files import read_splits
from comkd_cli.recipe import load_recipe
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.loading import bundled_recipes, check_recipes, to_yaml
from comkd_cli.results.curve import judge, read_curve
from comkd_cli.results.records import Record, Results, to_json
from comkd_cli.results.result_files import add_results
from comkd_cli.results.tables import to_csv, to_latex, to_markdown

CLASSES = ("red fox", "hare", "owl")
ALIASES = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{below}, *{below}, *{below}, *{below}]\n"
    for below, name in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)
"""Four thousand million lists in a few lines of YAML."""
YAML_TRICKS = (
    "a: !!python/object/apply:os.system ['touch CANARY']\n",
    "!!python/object/new:os.system [touch CANARY]\n",
    "a: &a [*a]\n",
    "a: {? {b: c} : d}\n",
    "[" * 3000,
    "{a: " * 2000,
    "a: !!binary aGk=\n",
    "a: 2026-13-45\n",
    "a: !!float nan\n",
    "a: &x {b: 1}\n<<: *x\n",
    "%TAG ! tag:x,2000:\n--- !a\n",
    "--- a\n--- b\n",
    "a: 1\na: 2\n",
    "a: " + "9" * 5000 + "\n",
    "a: " + "1:" * 500 + "1\n",
    "\t- a\n",
    ALIASES,
    f"{ALIASES}about: *q\n",
)


@cache
def _recipe_texts() -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in bundled_recipes().items()}


@cache
def _recipe_trees() -> dict[str, Any]:
    return {name: YAML(typ="safe", pure=True).load(text) for name, text in _recipe_texts().items()}


def _yaml(tree: Any) -> str:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, stream)
    return stream.getvalue()


def _written(rng: random.Random, path: Path, text: str) -> Path:
    """A file of the text; one in three is damaged."""
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(mutations.damaged(rng, content) if rng.random() < 0.33 else content)
    return path


def recipe(rng: random.Random, folder: Path) -> None:
    """A recipe that is damaged, has a hostile field, or is YAML that bites; what is accepted reads back the same."""
    name = rng.choice(sorted(_recipe_texts()))
    kind = rng.randrange(4)
    if kind == 0:
        text = _recipe_texts()[name]
    elif kind == 1:
        text = rng.choice(("", _recipe_texts()["digits"])) + rng.choice(YAML_TRICKS)
    else:
        tree = mutations.changed(rng, _recipe_trees()[name], times=3)
        if kind == 3 and isinstance(tree, dict):
            tree["extends"] = rng.choice(("hostile.yaml", "digits", mutations.text(rng), mutations.value(rng)))
        text = json.dumps(tree)  # which is YAML
    path = _written(rng, folder / "hostile.yaml", text)
    check_recipes([str(path)])
    read = load_recipe(path)
    (folder / "again.yaml").write_text(to_yaml(read), encoding="utf-8")
    assert load_recipe(folder / "again.yaml") == read


def setting(rng: random.Random, folder: Path) -> None:
    """`--set` with hostile keys and values."""
    keys = ("data.folder", "optim.epochs", "student.config.vision_cfg.layers", "teacher.adapt", "seed", "loss", "data")
    settings = []
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(
            (rng.choice(keys), mutations.text(rng), f"{rng.choice(keys)}.{mutations.text(rng)}", "a." * 900)
        )
        held = rng.choice((mutations.text(rng), json.dumps(mutations.value(rng)), rng.choice(YAML_TRICKS)))
        settings.append(rng.choice((f"{key}={held}", key, f"{key}=={held}")))
    to_yaml(load_recipe("digits", settings))


def split(rng: random.Random, folder: Path) -> None:
    """The lists of a dataset of the suite: a split file, FGVC-Aircraft's text files, or ImageNet's class names."""
    layout = rng.choice(("split", "split", "aircraft", "imagenet", "imagenet-variant"))
    dataset = rng.choice([entry for entry in CATALOG.values() if entry.layout == layout])
    home = folder / dataset.folder
    home.mkdir()
    if layout == "split":
        images = [[f"{name}/{n}.jpg", label, name] for label, name in enumerate(CLASSES) for n in range(2)]
        listed = {"train": images, "val": images[:2], "test": [[f"t/{path}", *rest] for path, *rest in images]}
        _written(rng, home / str(dataset.split_file), json.dumps(mutations.changed(rng, listed, times=3)))
    elif layout == "aircraft":
        variants = [rng.choice((*CLASSES, mutations.text(rng))) for _ in range(4)]
        _written(rng, home / "variants.txt", "\n".join(variants))
        for name in ("train", "val", "test"):
            lines = (f"{n:07} {rng.choice((*variants, mutations.text(rng)))}" for n in range(3))
            _written(rng, home / f"images_variant_{name}.txt", "\n".join(lines))
    else:
        names = [rng.choice((*CLASSES, mutations.text(rng))) for _ in range(4)]
        lines = (f"n{position:08} {name}" for position, name in enumerate(names))
        _written(rng, home / "classnames.txt", "\n".join(lines))
        place = home / dataset.images / ("train/n00000000" if layout == "imagenet" else "n00000000")
        place.mkdir(parents=True)
        (place / "a.jpg").touch()
        if layout == "imagenet":
            (home / dataset.images / "val" / "n00000001").mkdir(parents=True)
            (home / dataset.images / "val" / "n00000001" / "b.jpg").touch()
    splits = read_splits(dataset, folder)
    assert all(name.isprintable() for name in splits.class_names.values() if name.isascii())


def class_list(rng: random.Random, folder: Path) -> None:
    """A class list, in a file or in a recipe; a name that is accepted is one line without control characters."""
    names = [rng.choice((*CLASSES, mutations.text(rng))) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.3:
        found = clean_class_names(names, "data.classes")
    else:
        found = read_class_names(_written(rng, folder / "classes.txt", "\n".join(names)))
    for name in found:
        assert len(name.splitlines()) == 1, name
        assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in name), name


def labels(rng: random.Random, folder: Path) -> None:
    """A file of labels."""
    stream = io.StringIO()
    writer = csv.writer(stream, dialect=rng.choice(("excel", "unix", "excel-tab")))
    writer.writerow(
        rng.choice((("path", "class"), ("class", "path", "note"), ("path",), (mutations.text(rng), "class")))
    )
    for number in range(rng.randrange(6)):
        row = [rng.choice((f"{number}.png", mutations.text(rng))), rng.choice((*CLASSES, mutations.text(rng)))]
        writer.writerow([cell.replace("\x00", "\x01") for cell in row])  # which Python's writer may refuse
    read = read_label_file(_written(rng, folder / "labels.csv", stream.getvalue()))
    read.labels(folder, ["0.png", "1.png"], [*CLASSES, *read.class_names], ["2.png"])


def prompts(rng: random.Random, folder: Path) -> None:
    """A file of class descriptions."""
    tree = mutations.changed(rng, {"red fox": "a red fox", "hare": ["a hare", "a leaping hare"]}, times=3)
    text = rng.choice((json.dumps(tree), rng.choice(YAML_TRICKS)))
    read_prompts(_written(rng, folder / "prompts.yaml", text), CLASSES)


def results(rng: random.Random, folder: Path) -> None:
    """A results.json of another origin, to which results with hostile names are added; every table is written."""
    record = Record("runs/a/b/seed1/student.pt", "student", "digits", 97.5, 97.0, 84, 1000)
    kept = mutations.changed(rng, json.loads(to_json(Results([record]))), times=3)
    _written(rng, folder / "results.json", json.dumps(kept))
    hostile = Record(mutations.text(rng) or "m", "student", mutations.text(rng) or "d", 1.0, 1.0, 1, 1)
    found = add_results(folder, Results([hostile]), lambda event: None)
    for line in to_markdown(found).splitlines():
        assert not line.startswith("|") or "<script" not in line.replace("\\<", ""), line
    assert "\\write18" not in to_latex(found).replace("\\textbackslash", "")
    rows = list(csv.DictReader(io.StringIO(to_csv(found.records))))
    assert len(rows) == len(found.records)


def curve(rng: random.Random, folder: Path) -> None:
    """The training curve of a run of unknown origin."""
    epochs = [{"epoch": number, "loss": 1.0 / number, "test_top1_percent": 90.0 + number} for number in range(1, 8)]
    lines = (json.dumps(mutations.changed(rng, epoch)) if rng.random() < 0.3 else json.dumps(epoch) for epoch in epochs)
    _written(rng, folder / "metrics.jsonl", "\n".join(lines))
    history = read_curve(folder)
    assert len(Counter(map(type, history))) <= 1
    if history:
        judge(history)
