"""The whole suite on a small data root: a few real images under the paths of each dataset."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from comkd_cli.data.digits import digits_source
from comkd_cli.errors import DataError
from comkd_cli.evaluation import features as features_module
from comkd_cli.events import Event
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe.catalog import CATALOG, Dataset
from comkd_cli.recipe.model import Model
from tests import tiny

CLASSES, PER_CLASS = 4, 3


def picture(path: Path, label: int, number: int) -> None:
    digits = digits_source().train
    positions = [i for i, own in enumerate(digits.labels or ()) if own == label]
    path.parent.mkdir(parents=True, exist_ok=True)
    digits.open(positions[number]).resize((20, 16), Image.Resampling.BICUBIC).save(path, "JPEG")


def fill(dataset: Dataset, root: Path) -> None:
    folder = root / dataset.folder
    names = [f"n0{label}" if dataset.layout.startswith("imagenet") else f"kind_{label}" for label in range(CLASSES)]
    splits: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for position, split in enumerate(splits):
        for label in range(CLASSES):
            for number in range(PER_CLASS):
                name = f"{names[label]}/{split}_{number}.jpg"
                splits[split].append([name, label, names[label]])
                if dataset.layout == "split":
                    picture(folder / dataset.images / name, label, 3 * position + number)
                elif dataset.layout == "aircraft":
                    picture(folder / "images" / f"{split}{label}{number}.jpg", label, 3 * position + number)
                elif dataset.layout == "imagenet" and split != "val":
                    place = folder / "images" / ("train" if split == "train" else "val")
                    picture(place / name, label, 3 * position + number)
                elif dataset.layout == "imagenet-variant" and split == "test":
                    own = str(label) if dataset.name == "imagenetv2" else names[label]
                    picture(folder / dataset.images / own / f"{number}.jpg", label, 3 * position + number)
    if dataset.layout == "split":
        (folder / str(dataset.split_file)).write_text(json.dumps(splits))
    elif dataset.layout == "aircraft":
        (folder / "variants.txt").write_text("".join(f"{name}\n" for name in names))
        for split in splits:
            lines = [f"{split}{x}{n} {names[x]}\n" for x in range(CLASSES) for n in range(PER_CLASS)]
            (folder / f"images_variant_{split}.txt").write_text("".join(lines))
    else:
        (folder / "classnames.txt").write_text("".join(f"{name} thing {name}\n" for name in names))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data root")
    for dataset in CATALOG.values():
        fill(dataset, folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random CLIP in a folder of its own, as open_clip reads one."""
    folder = tmp_path_factory.mktemp("clip")
    config = {"model_cfg": tiny.CLIP, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(build_clip(Model(config=tiny.CLIP), seed=3).model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def bench(
    root: Path, features: Path | None, protocols: Sequence[str], datasets: Sequence[str] = tuple(CATALOG)
) -> Bench:
    def ignore(event: Event) -> None:
        pass

    return Bench(
        torch.device("cpu"),
        root,
        ignore,
        features=features,
        datasets=tuple(datasets),
        protocols=tuple(protocols),
        shots=(1, 2),
        seeds=(1,),
    )


EVERY = ("zero-shot", "base-to-novel", "few-shot", "cross-dataset", "domain-generalization")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.mark.slow
def test_one_call_covers_every_dataset_and_protocol(root: Path, clip: str, kept: Path) -> None:
    results = evaluate(clip, Path("runs"), bench(root, kept, EVERY))
    assert results.missing == []
    zero = [r for r in results.records if r.protocol == "zero-shot" and r.method == "clip"]
    assert [r.dataset for r in zero] == list(CATALOG)
    assert all(r.images == CLASSES * PER_CLASS for r in zero)
    halves = [r for r in results.records if r.protocol == "base-to-novel"]
    assert len(halves) == 2 * 11
    assert all(r.images == 2 * PER_CLASS for r in halves)
    few = [r for r in results.records if r.protocol == "few-shot"]
    assert len(few) == 11 * 3 * 2  # datasets, methods, shots
    assert {r.dataset for r in results.records if r.protocol == "domain-generalization"} == {
        "imagenetv2",
        "imagenet_sketch",
        "imagenet_a",
        "imagenet_r",
    }
    assert len([r for r in results.records if r.protocol == "cross-dataset"]) == 10
    assert {r.dataset for r in results.records if r.method == "clip-ensemble"} == {
        name for name in CATALOG if name.startswith("imagenet")
    }


@pytest.mark.slow
def test_a_second_call_with_other_shots_or_protocols_reads_no_image(
    root: Path, clip: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = ("dtd", "fgvc_aircraft", "imagenet", "imagenet_a")
    first = evaluate(clip, Path("runs"), bench(root, kept, EVERY, some))

    def refuse(*arguments: object) -> None:
        raise AssertionError("an image is read")

    monkeypatch.setattr(features_module, "shared_scoring_batches", refuse)
    again = evaluate(clip, Path("runs"), bench(root, kept, EVERY, some))
    assert again == first
    other = bench(root, kept, ("few-shot",), some)
    assert evaluate(clip, Path("runs"), Bench(**{**vars(other), "shots": (4, 16), "seeds": (3,)})).records


def test_a_missing_dataset_is_a_row_and_the_others_are_scored(root: Path, clip: str, tmp_path: Path) -> None:
    (tmp_path / "dtd").symlink_to(root / "dtd")
    results = evaluate(clip, Path("runs"), bench(tmp_path, None, ("zero-shot",), ("eurosat", "dtd")))
    assert [record.dataset for record in results.records] == ["dtd"]
    assert [entry.dataset for entry in results.missing] == ["eurosat"]
    assert "comkd datasets check eurosat" in results.missing[0].problem


def test_nothing_at_all_is_an_error(clip: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)eurosat.*dtd"):
        evaluate(clip, Path("runs"), bench(tmp_path, None, ("zero-shot",), ("eurosat", "dtd")))


def test_datasets_without_a_student_are_rows_with_the_command_to_train_one(tiny_student: Path, root: Path) -> None:
    runs = tiny_student.parents[3]
    results = evaluate(None, runs, bench(root, None, ("zero-shot",), ("digits", "eurosat")))
    assert {record.dataset for record in results.records} == {"digits"}
    assert "comkd distill RECIPE --dataset eurosat" in results.missing[0].problem


def test_a_student_whose_teacher_was_trained_on_labels_of_its_data_is_not_scored_as_cross_dataset(
    tiny_student: Path, tmp_path: Path
) -> None:
    own = bench(tmp_path, None, EVERY, ("digits",))
    events: list[Event] = []
    results = evaluate(str(tiny_student), tmp_path, Bench(**{**vars(own), "report": events.append, "datasets": ()}))
    assert {record.protocol for record in results.records} == {"zero-shot", "base-to-novel", "few-shot"}
    assert any("not novel" in str(event) for event in events)


def test_a_protocol_that_applies_to_nothing_is_an_error(root: Path, clip: str) -> None:
    with pytest.raises(DataError, match="domain-generalization does not apply"):
        evaluate(clip, Path("runs"), bench(root, None, ("domain-generalization",), ("dtd", "eurosat")))
