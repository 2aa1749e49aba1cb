import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from comkd_cli.data.catalogued import catalogued_source
from comkd_cli.data.check import check_dataset
from comkd_cli.data.sources import open_source
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.model import Data
from tests.data.test_conversion import pictures
from tests.flows.test_suite import fill

SMALL = replace(CATALOG["eurosat"], classes=2, train=2, val=1, test=2, base_test=1, new_test=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    listed = {
        "train": [["A/1.jpg", 0, "annual_crop"], ["B/1.jpg", 1, "Forest"]],
        "val": [["A/2.jpg", 0, "annual_crop"]],
        "test": [["A/3.jpg", 0, "annual_crop"], ["B/2.jpg", 1, "Forest"]],
    }
    folder = tmp_path / "eurosat"
    for name in ("A/1.jpg", "A/2.jpg", "A/3.jpg", "B/1.jpg", "B/2.jpg"):
        path = folder / "2750" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "green").save(path)
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(listed))
    return tmp_path


def test_a_whole_data_set_is_ready(root: Path) -> None:
    ticks: list[tuple[int, int]] = []
    found = check_dataset(SMALL, root, deep=True, tick=lambda done, total: ticks.append((done, total)))
    assert (found.state, found.problems, found.remedy) == ("ready", (), "")
    assert (found.classes, found.train, found.val, found.test) == (2, 2, 1, 2)
    assert ticks[-1] == (5, 5)


def test_links_are_followed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("linked")
    (other / "eurosat").symlink_to(root / "eurosat")
    assert check_dataset(SMALL, other).state == "ready"


def test_a_missing_folder_is_missing_and_told_where_to_put_it(tmp_path: Path) -> None:
    found = check_dataset(SMALL, tmp_path)
    assert found.state == "missing"
    assert str(tmp_path / "eurosat") in found.remedy


def test_missing_images_and_wrong_counts_are_told(root: Path) -> None:
    (root / "eurosat" / "2750" / "B" / "2.jpg").unlink()
    found = check_dataset(replace(SMALL, train=3), root)
    assert found.state == "incomplete"
    assert found.missing_images == 1
    assert found.problems == (
        "2 train images instead of the published 3",
        "1 of 5 images are missing: 2750/B/2.jpg",
    )


def test_a_damaged_image_is_found_only_by_decoding(root: Path) -> None:
    (root / "eurosat" / "2750" / "B" / "2.jpg").write_bytes(b"no")
    assert check_dataset(SMALL, root).state == "ready"
    deep = check_dataset(SMALL, root, deep=True)
    assert (deep.state, deep.unreadable_images) == ("incomplete", 1)
    assert "2.jpg" in deep.problems[0]


def test_a_missing_split_file_is_told(root: Path) -> None:
    (root / "eurosat" / "split_zhou_EuroSAT.json").unlink()
    found = check_dataset(SMALL, root)
    assert found.state == "incomplete"
    assert "split_zhou_EuroSAT.json" in found.problems[0]


def test_a_data_set_is_a_source_with_spaces_in_its_class_names(root: Path) -> None:
    source = catalogued_source(SMALL, root)
    assert source.class_names == ("annual crop", "Forest")
    assert source.prompts[0] == "a centered satellite photo of annual crop."
    assert source.train.keys == ("2750/A/1.jpg", "2750/B/1.jpg")
    assert source.test is not None
    assert source.test.labels == (0, 1)
    assert source.test.open(1).size == (8, 8)


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        catalogued_source(SMALL, tmp_path)
    assert caught.value.path == tmp_path / "eurosat"
    assert "comkd datasets check eurosat" in str(caught.value.remedy)


def test_labels_with_gaps_are_told_as_opening_the_data_set_tells_them(root: Path) -> None:
    path = root / "eurosat" / "split_zhou_EuroSAT.json"
    shifted = {split: [[image, label + 1, name] for image, label, name in rows] for split, rows in listed(path).items()}
    path.write_text(json.dumps({**shifted, "test": shifted["test"][:1]}))
    found = check_dataset(replace(SMALL, test=1, base_test=1, new_test=0), root)
    told: list[Event] = []
    open_source(Data(dataset="eurosat"), root, report=told.append)
    said = [event.text for event in told if isinstance(event, Notice)]
    assert len(said) == len(found.notes) == 2
    assert all(text.endswith(note) for text, note in zip(said, found.notes, strict=True))
    assert found.state == "ready"
    assert "run from 1 to 2; they are renumbered from 0 to 1" in found.notes[0]
    assert found.notes[1].startswith("no validation images of: Forest; no test images of: Forest")
    assert found.as_plain()["notes"] == list(found.notes)


def test_two_names_of_one_label_leave_a_data_set_incomplete(root: Path) -> None:
    path = root / "eurosat" / "split_zhou_EuroSAT.json"
    path.write_text(json.dumps({**listed(path), "test": [["A/3.jpg", 2, "Annual crop"]]}))
    found = check_dataset(SMALL, root)
    assert (found.state, found.notes) == ("incomplete", ())
    assert "test[0]: 'Annual crop' has the label 0 in train[0], but here: 2" in found.problems[0]


def test_a_data_set_of_one_class_is_refused(root: Path) -> None:
    path = root / "eurosat" / "split_zhou_EuroSAT.json"
    path.write_text(json.dumps({split: rows[:1] for split, rows in listed(path).items()}))
    with pytest.raises(DataError) as caught:
        catalogued_source(SMALL, root)
    assert (caught.value.path, caught.value.found) == (root / "eurosat", 1)


def listed(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    found: dict[str, list[tuple[str, int, str]]] = json.loads(path.read_text())
    return found


def test_a_deep_check_counts_images_that_can_be_read_in_more_than_one_way(tmp_path: Path) -> None:
    fill(CATALOG["dtd"], tmp_path)
    folder = tmp_path / "dtd/images/kind_0"
    made = pictures(tmp_path)
    for number, kind in enumerate(("oriented", "alpha", "deep")):
        shutil.copy(made[kind], folder / f"train_{number}.jpg")
    shallow, deep = (check_dataset(CATALOG["dtd"], tmp_path, deep=each) for each in (False, True))
    assert (deep.oriented_images, deep.transparent_images, deep.sixteen_bit_images) == (1, 1, 1)
    assert any("1 images with an EXIF orientation, 1 images with transparency" in note for note in deep.notes)
    assert shallow.oriented_images is None
    assert deep.unreadable_images == 0
