import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from comkd_cli.data.catalogued import catalogued_source
from comkd_cli.data.sources import open_source
from comkd_cli.data.split_files import read_splits
from comkd_cli.data.splits import Entry, Splits, draw_shots, sample_shots, select_half
from comkd_cli.errors import DataError
from comkd_cli.events import Event
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.model import Data


def write_json(root: Path, splits: dict[str, list[list[object]]]) -> Path:
    path = root / "dtd" / "split_zhou_DescribableTextures.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(splits))
    return path


LISTED: dict[str, list[list[object]]] = {
    "train": [
        ["b/1.jpg", 1, "b_b"],
        ["a/1.jpg", 0, "a"],
        ["b/2.jpg", 1, "b_b"],
        ["b/3.jpg", 1, "b_b"],
        ["c/1.jpg", 2, "c"],
    ],
    "val": [["a/2.jpg", 0, "a"]],
    "test": [["a/3.jpg", 0, "a"], ["c/2.jpg", 2, "c"], ["b/4.jpg", 1, "b_b"]],
}


def test_a_split_file_is_read_in_its_order_with_paths_from_the_data_sets_folder(tmp_path: Path) -> None:
    write_json(tmp_path, LISTED)
    splits = read_splits(CATALOG["dtd"], tmp_path)
    assert splits.train[0] == Entry("images/b/1.jpg", 1, "b_b")
    assert splits.as_plain()["test"] == [
        ["images/a/3.jpg", 0, "a"],
        ["images/c/2.jpg", 2, "c"],
        ["images/b/4.jpg", 1, "b_b"],
    ]


def test_test_images_that_are_trained_on_too_are_reported(tmp_path: Path) -> None:
    write_json(tmp_path, {**LISTED, "test": [*LISTED["test"], ["b/2.jpg", 1, "b_b"], ["a/2.jpg", 0, "a"]]})
    told = read_splits(CATALOG["dtd"], tmp_path).notices
    assert told == (
        "dtd: split_zhou_DescribableTextures.json lists 1 image in train and in test: images/b/2.jpg",
        "dtd: split_zhou_DescribableTextures.json lists 1 image in val and in test: images/a/2.jpg",
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"train": [["a"]], "val": [], "test": []}', '{"train": []}'])
def test_a_file_that_is_no_split_file_is_named(tmp_path: Path, content: str) -> None:
    path = write_json(tmp_path, LISTED)
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["dtd"], tmp_path)
    assert caught.value.path == path


def test_aircraft_is_read_from_its_lists(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    folder.mkdir()
    (folder / "variants.txt").write_text("707-320\nBoeing 717\n")
    for name, lines in (("train", "001 Boeing 717\n002 707-320\n"), ("val", ""), ("test", "003 707-320\n")):
        (folder / f"images_variant_{name}.txt").write_text(lines)
    splits = read_splits(CATALOG["fgvc_aircraft"], tmp_path)
    assert splits.as_plain() == {
        "train": [["images/001.jpg", 1, "Boeing 717"], ["images/002.jpg", 0, "707-320"]],
        "val": [],
        "test": [["images/003.jpg", 0, "707-320"]],
    }
    (folder / "images_variant_val.txt").write_text("004 Zeppelin\n")
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["fgvc_aircraft"], tmp_path)
    assert (caught.value.path, caught.value.field) == (folder / "images_variant_val.txt", "line 1")
    assert caught.value.found == "'Zeppelin'"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_imagenet_is_read_from_its_folders_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet"
    for name in ("train/n02/b.JPEG", "train/n02/a.JPEG", "train/n01/x.JPEG", "val/n01/v.JPEG", "val/n02/w.JPEG"):
        touch(folder / "images" / name)
    (folder / "classnames.txt").write_text("n01 tench\nn02 great white shark\n")
    splits = read_splits(CATALOG["imagenet"], tmp_path)
    assert [entry.path for entry in splits.train] == [
        "images/train/n01/x.JPEG",
        "images/train/n02/a.JPEG",
        "images/train/n02/b.JPEG",
    ]
    assert splits.val == ()
    assert splits.test[1] == Entry("images/val/n02/w.JPEG", 1, "great white shark")


def test_variants_take_the_classes_that_they_have_or_numbers(tmp_path: Path) -> None:
    names = "n01 tench\nn02 shark\nn03 ray\n"
    for folder, images in (
        ("imagenet-adversarial", ["imagenet-a/n01/a.jpg", "imagenet-a/n03/b.jpg"]),
        ("imagenetv2", [f"imagenetv2-matched-frequency-format-val/{n}/{n}.jpeg" for n in range(3)]),
    ):
        for image in images:
            touch(tmp_path / folder / image)
        (tmp_path / folder / "classnames.txt").write_text(names)
    adversarial = read_splits(CATALOG["imagenet_a"], tmp_path)
    assert [(e.label, e.class_name) for e in adversarial.test] == [(0, "tench"), (1, "ray")]
    second = read_splits(CATALOG["imagenetv2"], tmp_path)
    assert [(e.label, e.class_name) for e in second.test] == [(0, "tench"), (1, "shark"), (2, "ray")]


def many(seed: int) -> Splits:
    order = random.Random(seed)
    entries = [Entry(f"{label}/{n}.jpg", label, str(label)) for label in range(7) for n in range(5 + 3 * label)]
    order.shuffle(entries)
    return Splits(tuple(entries), tuple(entries[:60]), tuple(entries))


TRAIN_LABELS = [2, 0, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1, 3, 0, 2, 1, 0, 2]
VAL_LABELS = [1, 0, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 3]


@pytest.mark.parametrize(
    ("shots", "seed", "train", "val"),
    [
        # Drawn by Dassl.pytorch itself (27eb2f4, DatasetBase.generate_fewshot_dataset with repeat=False, after
        # random.seed(seed)), train before val, on the labels above.
        (1, 1, [4, 13, 2, 12], [0, 9, 11, 13]),
        (2, 3, [4, 14, 13, 3, 8, 11, 12], [0, 7, 1, 9, 8, 11, 13]),
        (4, 2, [0, 17, 14, 4, 3, 6, 13, 9, 5, 2, 8, 11, 12], [10, 7, 4, 0, 12, 9, 6, 3, 2, 11, 5, 8, 13]),
        (
            8,
            1,
            [0, 4, 7, 10, 14, 17, 1, 3, 6, 9, 13, 16, 2, 5, 8, 11, 15, 12],
            [4, 7, 0, 10, 1, 9, 3, 6, 11, 2, 8, 5, 13],
        ),
    ],
)
def test_shots_are_those_that_dassl_draws(shots: int, seed: int, train: list[int], val: list[int]) -> None:
    assert draw_shots(TRAIN_LABELS, VAL_LABELS, shots, seed) == (train, val)


def test_sampled_splits_keep_the_test_images() -> None:
    splits = many(1)
    sampled = sample_shots(splits, 2, seed=3)
    labels = [entry.label for entry in splits.train], [entry.label for entry in splits.val]
    train, val = draw_shots(*labels, 2, 3)
    assert sampled.train == tuple(splits.train[i] for i in train)
    assert sampled.val == tuple(splits.val[i] for i in val)
    assert sampled.test == splits.test


def test_the_first_half_of_an_odd_number_of_classes_is_the_larger() -> None:
    splits = many(1)
    base, new = select_half(splits, "base"), select_half(splits, "new")
    assert {entry.class_name for entry in base.test} == {"0", "1", "2", "3"}
    assert {entry.label for entry in new.test} == {0, 1, 2}
    assert {entry.class_name for entry in new.test} == {"4", "5", "6"}
    assert len(base.test) + len(new.test) == len(splits.test)
    assert select_half(splits, "all") == splits


def test_published_base_and_new_counts_add_up_to_the_test_images() -> None:
    for dataset in CATALOG.values():
        if dataset.base_test is not None and dataset.new_test is not None:
            assert dataset.base_test + dataset.new_test == dataset.test, dataset.name


def test_templates_hold_the_class_name_once() -> None:
    assert all(dataset.template.count("{}") == 1 for dataset in CATALOG.values())
    assert len(CATALOG) == 15


# --- labels always index the classes ------------------------------------------------------------------


@pytest.mark.parametrize("shift", [lambda label: label + 1, lambda label: 5 * label, lambda label: 2 - label])
def test_labels_with_gaps_are_renumbered_in_their_order_and_told(tmp_path: Path, shift: Callable[[int], int]) -> None:
    listed = {split: [[path, shift(label), name] for path, label, name in rows] for split, rows in LISTED.items()}
    write_json(tmp_path, listed)  # type: ignore[arg-type]
    splits = read_splits(CATALOG["dtd"], tmp_path)
    named = {entry.path: (entry.label, entry.class_name) for entry in (*splits.train, *splits.val, *splits.test)}
    names = list(splits.class_names.values())
    assert list(splits.class_names) == [0, 1, 2]
    assert all(names[label] == name.replace("_", " ") for label, name in named.values())
    # The order of the labels is the order of the classes.
    given = sorted({(label, name) for rows in listed.values() for _, label, name in rows})
    assert names == [str(name).replace("_", " ") for _, name in given]
    assert len(splits.notices) == (0 if [label for label, _ in given] == [0, 1, 2] else 1)
    if splits.notices:
        assert f"run from {given[0][0]} to {given[-1][0]}; they are renumbered from 0 to 2" in splits.notices[0]
    source = catalogued_source(CATALOG["dtd"], tmp_path)
    assert source.test is not None
    assert [source.class_names[label] for label in source.test.labels or ()] == ["a", "c", "b b"]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (["x.jpg", -1, "a"], "invalid label: -1"),
        (["x.jpg", 1.0, "a"], "invalid label: 1.0"),
        (["x.jpg", True, "b_b"], "invalid label: True"),
        (["x.jpg", "1", "b_b"], "invalid label: '1'"),
        (["x.jpg", None, "b_b"], "invalid label: None"),
        (["x.jpg", 1, 7], "invalid class name: 7"),
        ([3, 1, "b_b"], "invalid path: 3"),
        (["", 1, "b_b"], "invalid path: ''"),
        (["x.jpg", 1], "is not [path, label, class name]: ['x.jpg', 1]"),
        ("abc", "is not [path, label, class name]: 'abc'"),
        (["x.jpg", 3, "a\nb"], "has a line break within it"),
        (["x.jpg", 3, "  "], "is empty"),
        (["x.jpg", 1, "c"], "label 1 is 'b_b' in train[0], but here: 'c'; give each class one label"),
        (["x.jpg", 3, "B b"], "'B b' has the label 1 in train[0], but here: 3; give each class one label"),
        (
            ["a/1.jpg", 2, "c"],
            "images/a/1.jpg has the label 0 in train[1], but here: 2; list each image under one class",
        ),
    ],
)
def test_an_entry_that_would_give_an_image_the_wrong_class_is_named(tmp_path: Path, entry: object, fault: str) -> None:
    path = write_json(tmp_path, {**LISTED, "test": [LISTED["test"][0], entry]})  # type: ignore[list-item]
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["dtd"], tmp_path)
    assert (caught.value.path, caught.value.field) == (path, "test[1]")
    assert str(caught.value).startswith(f"{path}: test[1]: {fault}")


def test_spellings_of_one_name_are_one_class(tmp_path: Path) -> None:
    write_json(tmp_path, {**LISTED, "test": [["x.jpg", 1, " b  b\u2028"]]})
    assert read_splits(CATALOG["dtd"], tmp_path).class_names[1] == "b b"


def test_variants_without_images_and_doubled_ones_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    folder.mkdir()
    (folder / "variants.txt").write_text("707-320\nBoeing 717\nDR-400\n")
    for name, lines in (("train", "001 DR-400\n"), ("val", ""), ("test", "003 707-320\n")):
        (folder / f"images_variant_{name}.txt").write_text(lines)
    splits = read_splits(CATALOG["fgvc_aircraft"], tmp_path)
    assert splits.class_names == {0: "707-320", 1: "DR-400"}
    assert [entry.label for entry in (*splits.train, *splits.test)] == [1, 0]
    (told,) = splits.notices
    assert told.startswith("fgvc_aircraft: 2 of the 3 classes of variants.txt have images; the others are skipped")
    (folder / "variants.txt").write_text("707-320\nDR-400\n707_320\nDR_400\nDR-400\n")
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["fgvc_aircraft"], tmp_path)
    assert caught.value.path == folder / "variants.txt"
    assert "'DR-400' at 2 and 5" in str(caught.value.found)


CLASSES = {"n01": "tench", "n02": "great white shark", "n03": "hen", "n04": "owl"}


def imagenet(root: Path, **synsets: str) -> Path:
    """A small ImageNet of two images for each of the synsets of a part: train="n01 n02", val="n01"."""
    folder = root / "imagenet"
    for part in ("train", "val"):
        (folder / "images" / part).mkdir(parents=True)
        for synset in synsets[part].split():
            for name in ("b.JPEG", "a.JPEG"):
                touch(folder / "images" / part / synset / name)
    (folder / "classnames.txt").write_text("".join(f"{synset} {name}\n" for synset, name in CLASSES.items()))
    return folder


def by_path(entries: Sequence[Entry], names: Mapping[int, str]) -> dict[str, str]:
    """The name of each image's label, by the folder of its class."""
    return {entry.path.split("/")[-2]: names[entry.label] for entry in entries}


@pytest.mark.parametrize(
    ("train", "val", "left"),
    [
        ("n01 n02 n03 n04", "n01 n02 n03 n04", None),
        ("n01 n03 n04", "n01 n03 n04", 3),
        ("n02 n04", "n02 n04", 2),
        ("n01 n02 n03 n04", "n02 n03", None),  # only the test images of two are missing
        ("n01 n02", "n03 n04", None),
        ("n03", "n04", 2),
    ],
)
def test_a_missing_class_folder_never_moves_another_classs_name(
    tmp_path: Path, train: str, val: str, left: int | None
) -> None:
    imagenet(tmp_path, train=train, val=val)
    splits = read_splits(CATALOG["imagenet"], tmp_path)
    names = splits.class_names
    for synsets, entries in ((train, splits.train), (val, splits.test)):
        assert by_path(entries, names) == {synset: CLASSES[synset] for synset in synsets.split()}
    assert list(names) == list(range(len({*train.split(), *val.split()})))
    if left is None:
        assert splits.notices == ()
    else:
        (told,) = splits.notices
        assert told.startswith(f"imagenet: {left} of the 4 classes of classnames.txt have images; the others are ")
    told_absent: list[Event] = []
    open_source(Data(dataset="imagenet"), tmp_path, report=told_absent.append)
    absent = [CLASSES[synset] for synset in train.split() if synset not in val.split()]
    assert any(f"no test images of: {', '.join(absent)}" in str(event) for event in told_absent) == bool(absent)


def test_an_empty_class_folder_is_a_class_without_images(tmp_path: Path) -> None:
    folder = imagenet(tmp_path, train="n01 n03", val="n01 n03")
    (folder / "images/train/n02").mkdir()
    assert list(read_splits(CATALOG["imagenet"], tmp_path).class_names.values()) == ["tench", "hen"]


def test_other_files_in_class_folders_are_no_images_and_counted(tmp_path: Path) -> None:
    folder = imagenet(tmp_path, train="n01 n02 n03 n04", val="n01 n02 n03 n04")
    for name in ("train/n01/list.txt", "train/n02/x.tar", "val/README.txt"):
        touch(folder / "images" / name)
    for name in ("train/__MACOSX/n01/a.JPEG", "train/n01/._a.JPEG", "train/n01/Thumbs.db", "val/.DS_Store"):
        touch(folder / "images" / name)
    splits = read_splits(CATALOG["imagenet"], tmp_path)
    assert (len(splits.train), len(splits.test)) == (8, 8)
    assert splits.notices == ("imagenet: 3 files of other types are skipped: 2 .txt, 1 .tar",)


def test_images_that_have_no_class_are_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = imagenet(tmp_path, train="n01 n02", val="")
    with pytest.raises(DataError, match="contains no images") as caught:
        read_splits(CATALOG["imagenet"], tmp_path)
    assert caught.value.path == folder / "images/val"
    touch(folder / "images/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["imagenet"], tmp_path)
    assert (caught.value.path, caught.value.found) == (folder / "images/val", "ILSVRC2012_val_00000001.JPEG")
    assert "folder of its class" in str(caught.value.remedy)


def test_class_folders_that_are_not_listed_or_nested_are_refused(tmp_path: Path) -> None:
    folder = imagenet(tmp_path, train="n01 n02 n05", val="n01 n02")
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["imagenet"], tmp_path)
    assert (caught.value.path, caught.value.found) == (folder / "images/train", "n05")
    (folder / "images/train/n05").rename(folder / "images/train/n01/images")
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["imagenet"], tmp_path)
    assert (caught.value.path, caught.value.found) == (folder / "images/train/n01", "images")


@pytest.mark.parametrize(
    ("content", "field", "problem"),
    [
        ("n01 tench\n\nn02 shark\n", "line 2", "is not a folder name and a class name"),
        ("n01 tench\nn02\n", "line 2", "is not a folder name and a class name"),
        ("n01 tench\nn02 shark\nn01 hen\n", "line 3", "is already in line 1"),
        ("n01 tench\nn02 sh\u2028ark\n", "line 2", "has a line break within it"),
        ("n01 tench\nn02 ___\n", "line 2", "is empty"),
        ("n01 tench\n", None, "too few classes"),
    ],
)
def test_a_class_list_whose_lines_would_shift_is_refused(
    tmp_path: Path, content: str, field: str | None, problem: str
) -> None:
    folder = imagenet(tmp_path, train="n01 n02", val="n01 n02")
    (folder / "classnames.txt").write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_splits(CATALOG["imagenet"], tmp_path)
    assert (caught.value.path, caught.value.field) == (folder / "classnames.txt", field)
    assert caught.value.problem == problem


def test_names_that_two_classes_share_are_told_since_openais_own_list_has_some(tmp_path: Path) -> None:
    folder = imagenet(tmp_path, train="n01 n02 n03 n04", val="n01 n02 n03 n04")
    (folder / "classnames.txt").write_text("n01 missile\nn02 hen\nn03 missile\nn04 owl\n")
    splits = read_splits(CATALOG["imagenet"], tmp_path)
    assert list(splits.class_names.values()) == ["missile", "hen", "missile", "owl"]
    (told,) = splits.notices
    assert told.endswith("gives the same name, and so the same prompt, to n01 (missile) and n03 (missile)")


def test_folders_numbered_by_lines_do_not_shift_either(tmp_path: Path) -> None:
    folder = tmp_path / "imagenetv2"
    for number in (0, 2, 3):
        touch(folder / f"imagenetv2-matched-frequency-format-val/{number}/x.jpeg")
    (folder / "classnames.txt").write_text("".join(f"{synset} {name}\n" for synset, name in CLASSES.items()))
    dataset = replace(CATALOG["imagenetv2"], classes=4)
    splits = read_splits(dataset, tmp_path)
    assert by_path(splits.test, splits.class_names) == {"0": "tench", "2": "hen", "3": "owl"}
    assert len(splits.notices) == 1
    touch(folder / "imagenetv2-matched-frequency-format-val/4/x.jpeg")
    with pytest.raises(DataError) as caught:
        read_splits(dataset, tmp_path)
    assert caught.value.found == "4"
    # A list that is shorter than the published one numbers other classes.
    assert any("has 3 lines instead of 1,000" in notice for notice in numbered_by_three_lines(tmp_path).notices)


def numbered_by_three_lines(root: Path) -> Splits:
    folder = root / "short/imagenetv2"
    for number in range(3):
        touch(folder / f"imagenetv2-matched-frequency-format-val/{number}/x.jpeg")
    (folder / "classnames.txt").write_text("n01 tench\nn02 shark\nn03 hen\n")
    return read_splits(CATALOG["imagenetv2"], root / "short")


def test_a_variant_with_its_own_200_classes_says_nothing_of_a_longer_list(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet-adversarial"
    for synset in ("n02", "n04"):
        touch(folder / "imagenet-a" / synset / "x.jpg")
    (folder / "classnames.txt").write_text("".join(f"{synset} {name}\n" for synset, name in CLASSES.items()))
    whole = read_splits(replace(CATALOG["imagenet_a"], classes=2), tmp_path)
    assert (whole.class_names, whole.notices) == ({0: "great white shark", 1: "owl"}, ())
    assert len(read_splits(CATALOG["imagenet_a"], tmp_path).notices) == 1
