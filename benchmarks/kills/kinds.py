"""The commands that are killed, and the files that they need."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from ruamel.yaml import YAML

from comkd_cli.data.contents import SETTLED_AFTER_SECONDS
from tests import tiny

TRAIN, TEST = 32, 16  # images to train on and to test on
TO_NAME = 100  # images of `predict --csv`, in 4 batches
STUDENT = "work/tiny/few/seed1/student.pt"
BUNDLE = "work/tiny/few/seed1/bundle"
ARCHIVE = "zhengli97/prompt_learning_dataset/eurosat.zip"
PADDING = 12 * 2**20  # bytes: the Hub's client writes 10 MiB at a time


@dataclass(frozen=True)
class Kind:
    """A command, started in the folder that `prepare` makes. It writes below `work`."""

    arguments: tuple[str, ...]
    share: float
    """Of the cases, in proportion to those of the other kinds."""
    needs: tuple[str, ...] = ()
    """Of `made`, a finished student and its teacher; `scored`, the same with results; and `bundle`, which is exported.
    `work` starts as the last of `made` and `scored`."""
    whole: tuple[str, ...] = ()
    """Files and folders that must be absent or complete at any time."""
    exported: bool = False
    """Whether torch.onnx.export copies what it wrote before, instead of taking seconds."""
    setup: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of tests.warm.Setup."""
    before: Callable[[], None] | None = None
    """Called in the new process."""


def fetch_little() -> None:
    """Let EuroSAT be the one that `eurosat` makes."""
    from comkd_cli.recipe.catalog import CATALOG

    counts = {"classes": 2, "train": 2, "val": 2, "test": 2, "base_test": 1, "new_test": 1}
    CATALOG["eurosat"] = replace(CATALOG["eurosat"], **counts)  # type: ignore[index, arg-type]


SCORES = ("evaluate", STUDENT, "--runs", "work", "--protocol", "zero-shot", "--protocol", "few-shot")
KINDS = {
    "distill": Kind(("distill", "tiny.yaml", "--runs", "work"), 10, whole=(STUDENT,)),
    "distill_workers": Kind(("distill", "tiny.yaml", "--runs", "work", "--set", "data.workers=1"), 0.5),
    "distill_fresh": Kind(("distill", "tiny.yaml", "--runs", "work", "--fresh"), 2, needs=("made", "scored")),
    "evaluate": Kind((*SCORES, "--shots", "1,2", "--seeds", "1"), 4, needs=("made",)),
    "export": Kind(
        ("export", STUDENT, "--runs", "work", "--force"),
        3,
        needs=("made",),
        whole=(BUNDLE,),
        exported=True,
    ),
    "export_torch": Kind(("export", STUDENT, "--runs", "work", "--force"), 0.5, needs=("made",), whole=(BUNDLE,)),
    "predict": Kind(("predict", "bundle", "pictures", "--csv", "work/table.csv"), 3, needs=("made", "bundle")),
    "fetch": Kind(
        ("datasets", "fetch", "eurosat", "--data-root", "work/data"),
        2,
        whole=("work/data/eurosat",),
        setup={"hub": True},
        before=fetch_little,
    ),
    "report": Kind(("report", "work/tiny/few/seed1", "--runs", "work"), 3, needs=("made",)),
}


def write_inputs(root: Path) -> None:
    """The images, and the recipe of a student and a teacher of 2 epochs each that are trained in a second."""
    tiny.digits_folder(root / "few", TRAIN, TEST)
    tiny.digits_folder(root / "pictures", TO_NAME, 0)
    data = {"folder": "few", "workers": 0}
    optim = {**tiny.OPTIM, "epochs": 3, "batch_size": 8}
    teacher = {"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 2, "batch_size": 16}}
    cache = {"views": 2, "dtype": "fp32"}
    with (root / "tiny.yaml").open("w") as stream:
        recipe = tiny.recipe(data=data, optim=optim, teacher=teacher, teacher_cache=cache)
        YAML(typ="safe", pure=True).dump(recipe, stream)
    # A digest is remembered once its file is older than this: every run must find the images in the same state.
    time.sleep(SETTLED_AFTER_SECONDS)


def start_with(kind: Kind, root: Path) -> None:
    """Make `work` what it is before the kind's command."""
    for folder in ("work", "temporary", "hub"):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir()
    for name in ("made", "scored"):
        if name in kind.needs:
            shutil.copytree(root / name, root / "work", dirs_exist_ok=True)


def eurosat() -> bytes:
    """An archive of EuroSAT's layout with two classes, and an image of each in each split."""
    splits = {
        split: [[f"{name}/{split}.jpg", label, name] for label, name in enumerate(("Forest", "River"))]
        for split in ("train", "val", "test")
    }
    picture, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(picture, "JPEG")
    with zipfile.ZipFile(archive, "w") as opened:
        for name, _, _ in chain.from_iterable(splits.values()):
            opened.writestr(f"eurosat/2750/{name}", picture.getvalue())
        opened.writestr("eurosat/split_zhou_EuroSAT.json", json.dumps(splits))
        opened.writestr("eurosat/padding.bin", os.urandom(PADDING))
    return archive.getvalue()
