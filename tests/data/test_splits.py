import json
import random
from pathlib import Path

import pytest

from comkd_cli.catalog import CATALOG
from comkd_cli.data.splits import Entry, Splits, read_splits, sample_shots, select_half
from comkd_cli.errors import DataError


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


@pytest.mark.parametrize("content", ["{", "[]", '{"train": [["a"]], "val": [], "test": []}', '{"train": []}'])
def test_a_file_that_is_no_split_file_is_named(tmp_path: Path, content: str) -> None:
    path = write_json(tmp_path, LISTED)
    path.write_text(content)
    with pytest.raises(DataError, match="split_zhou_DescribableTextures"):
        read_splits(CATALOG["dtd"], tmp_path)


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
    with pytest.raises(DataError, match=r"images_variant_val\.txt: line 1: 'Zeppelin'"):
        read_splits(CATALOG["fgvc_aircraft"], tmp_path)


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


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shots_are_drawn_as_the_reference_procedure_draws_them(shots: int, seed: int) -> None:
    splits = many(seed)
    sampled = sample_shots(splits, shots, seed)
    random.seed(seed)  # the reference draws from the global stream, train before val
    for given, found, k in ((splits.train, sampled.train, shots), (splits.val, sampled.val, min(shots, 4))):
        seen: list[int] = []
        for entry in given:
            if entry.label not in seen:
                seen.append(entry.label)
        expected: list[Entry] = []
        for label in seen:
            items = [entry for entry in given if entry.label == label]
            expected.extend(random.sample(items, k) if len(items) >= k else items)
        assert list(found) == expected
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
