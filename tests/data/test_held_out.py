"""Sources without a test split: what is trained on, what is measured on, and what the user is told."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from comkd_cli.data.held_out import count_shared, without_images_of
from comkd_cli.data.holdout import Holdout
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.sources import INDEX, open_source, reopen_source
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice
from comkd_cli.recipe.model import Data

WriteImage = Callable[..., Path]
UNLABELLED, PER_CLASS = 40, 8


@pytest.fixture
def photos(tmp_path: Path, write_image: WriteImage) -> Path:
    """Unlabelled images."""
    for number in range(UNLABELLED):
        write_image(tmp_path / f"photos/{number}.png", seed=number)
    return tmp_path / "photos"


@pytest.fixture
def pets(tmp_path: Path, write_image: WriteImage) -> Path:
    """Labelled training images alone."""
    for label, name in enumerate(("cat", "dog", "fox")):
        for number in range(PER_CLASS):
            write_image(tmp_path / f"pets/train/{name}/{number}.png", seed=100 * label + number)
    return tmp_path / "pets"


def data_of(folder: Path, **changes: object) -> Data:
    classes = None if (folder / "train").exists() else ("cat", "dog")
    return Data.model_validate({"folder": str(folder), "classes": classes, **changes})


def opened(data: Data, events: list[Event] | None = None) -> Source:
    told = [] if events is None else events
    return open_source(data, Path("data"), Path(str(data.folder)).parent / "runs", told.append)


def notices(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


def keys_of(images: ImageSet | None) -> set[str]:
    assert images is not None
    return set(images.keys)


def test_unlabelled_images_are_divided_once_and_each_is_on_one_side(photos: Path) -> None:
    events: list[Event] = []
    source = opened(data_of(photos, holdout_percent=30), events)
    assert source.test is not None
    assert source.test.labels is None
    assert not keys_of(source.train) & keys_of(source.test)
    assert len(source.train) + len(source.test) == UNLABELLED
    assert source.holdout == Holdout(30.0)
    assert source.test_name == "held-out images"
    assert f"{len(source.test)} of {UNLABELLED} images are held out" in notices(events)
    assert "has a wide interval" in notices(events)  # of fewer than 30 images


def test_copies_and_renamed_images_stay_on_their_side(photos: Path) -> None:
    before = opened(data_of(photos, holdout_percent=30))
    (photos / "copies").mkdir()
    for path in sorted(photos.glob("*.png")):
        shutil.copy(path, photos / "copies" / f"copy of {path.name}")
    after = opened(data_of(photos, holdout_percent=30))
    for images, kept in ((before.train, after.train), (before.test, after.test)):
        assert keys_of(kept) == {name for key in keys_of(images) for name in (key, f"copies/copy of {key}")}


def test_each_class_has_images_on_both_sides(pets: Path) -> None:
    source = opened(data_of(pets, holdout_percent=1))
    assert source.test is not None
    assert set(source.test.labels or ()) == set(source.train.labels or ()) == {0, 1, 2}
    assert sum(source.holdout.exceptions.values()) >= 1  # type: ignore[union-attr]


def test_a_test_split_or_a_val_that_is_scored_leaves_the_source_as_it_is(pets: Path, write_image: WriteImage) -> None:
    for split in ("val", "test"):
        for name in ("cat", "dog", "fox"):
            write_image(pets / split / name / "0.png", seed=7)
        source = opened(data_of(pets))
        assert (len(source.train), source.holdout, source.test_name) == (3 * PER_CLASS, None, "test images")


def test_zero_trains_on_every_image(photos: Path) -> None:
    source = opened(data_of(photos, holdout_percent=0))
    assert (len(source.train), source.test, source.holdout) == (UNLABELLED, None, None)
    assert not (photos.parent / "runs").exists()  # no content was read


def test_a_share_that_holds_out_nothing_is_said_and_changes_nothing(photos: Path) -> None:
    events: list[Event] = []
    source = opened(data_of(photos, holdout_percent=1e-9), events)
    assert (len(source.train), source.test, source.holdout) == (UNLABELLED, None, None)
    assert "measured on training images" in notices(events)


def test_a_share_that_leaves_too_few_to_train_on_is_refused(photos: Path) -> None:
    with pytest.raises(DataError) as caught:
        opened(data_of(photos, holdout_percent=99.999999))
    assert (caught.value.path, caught.value.field) == ("photos", "data.holdout_percent")
    assert "set it to 0" in str(caught.value.remedy)


def test_with_size_and_time_no_file_is_read(photos: Path) -> None:
    data = data_of(photos, holdout_percent=30, fingerprint="size_and_time")
    events: list[Event] = []
    before = opened(data, events)
    assert "chosen by file name and size" in notices(events)
    assert not (photos.parent / "runs" / INDEX).exists()
    for path in photos.glob("*.png"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)  # of the same size
    assert keys_of(opened(data).test) == keys_of(before.test)


def test_a_student_finds_its_own_held_out_images_whatever_was_removed(pets: Path) -> None:
    data = data_of(pets, holdout_percent=1)
    trained = opened(data)
    assert trained.test is not None
    trained_on = keys_of(trained.train)
    (pets / "train" / sorted(trained.test.keys)[0]).unlink()  # of a class with one held-out image
    fresh = opened(data)
    assert keys_of(fresh.test) & trained_on  # another division would measure on a learned image
    again = reopen_source(data, trained.holdout, Path("data"), pets.parent / "runs")
    assert keys_of(again.test) == keys_of(trained.test) - {sorted(trained.test.keys)[0]}
    assert keys_of(again.train) == trained_on


def test_a_student_that_was_trained_on_every_image_holds_none_out(pets: Path) -> None:
    source = reopen_source(data_of(pets), None, Path("data"), pets.parent / "runs")
    assert (len(source.train), source.test) == (3 * PER_CLASS, None)


def test_images_of_another_set_are_found_by_content(photos: Path, pets: Path) -> None:
    source, other = opened(data_of(photos, holdout_percent=0)), opened(data_of(pets, holdout_percent=0))
    assert count_shared(other.train, source.train) == PER_CLASS  # the cats are drawn from the same seeds
    left = without_images_of(source.train, other.train, "contents")
    assert keys_of(left) == {f"{number}.png" for number in range(PER_CLASS, UNLABELLED)}


@pytest.mark.parametrize(("labelled", "percent", "scored"), [(120, 50, True), (40, 50, False)])
def test_of_partly_labelled_images_enough_labelled_ones_are_scored_or_all_without_labels(
    tmp_path: Path, write_image: WriteImage, labelled: int, percent: int, scored: bool
) -> None:
    paths = [write_image(tmp_path / f"photos/{number}.png", seed=number) for number in range(160)]
    rows = [f"{path.name},{('cat', 'dog')[index % 2]}" for index, path in enumerate(paths[:labelled])]
    (tmp_path / "labels.csv").write_text("path,class\n" + "\n".join(rows) + "\n")
    events: list[Event] = []
    data = data_of(tmp_path / "photos", holdout_percent=percent, labels=str(tmp_path / "labels.csv"))
    source = opened(data, events)
    assert source.test is not None
    named = {row.partition(",")[0] for row in rows}
    if scored:
        assert keys_of(source.test) <= named
        assert len(source.test) >= 30
        assert source.test.labels is not None
        assert set(source.test.labels) == {0, 1}
        assert f"the {len(source.test)} of them that have labels are scored" in notices(events)
    else:
        assert source.test.labels is None
        assert len(named & keys_of(source.test)) < 30
        assert not keys_of(source.test) <= named
        assert "no accuracy" in notices(events)
    assert not keys_of(source.test) & keys_of(source.train)
