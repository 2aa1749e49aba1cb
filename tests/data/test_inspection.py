"""What comkd init sees of a folder: against files whose state is known by how they were made."""

import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from comkd_cli.data.inspection import inspect_folder
from comkd_cli.errors import DataError

WriteImage = Callable[..., Path]


@pytest.fixture
def pets(tmp_path: Path, write_image: WriteImage) -> Path:
    """train/ and test/ of two classes, four and two images each, all of different content."""
    folder = tmp_path / "pets"
    for c, name in enumerate(("cat", "dog")):
        for i in range(4):
            write_image(folder / f"train/{name}/{i}.jpg", seed=100 * c + i)
        for i in range(2):
            write_image(folder / f"test/{name}/{i}.png", seed=100 * c + 50 + i, size=(20, 9))
    return folder


def test_a_labelled_folder_is_counted(pets: Path) -> None:
    found = inspect_folder(pets)
    assert (len(found.source.train), len(found.source.test or ())) == (8, 4)
    assert (found.source.class_names, found.listed_classes, found.untrained_classes) == (("cat", "dog"), None, ())
    assert found.suffixes == Counter({".jpg": 8, ".png": 4})
    assert found.total_bytes == sum(path.stat().st_size for path in pets.rglob("*.*"))
    sample = found.sample
    assert (sample.images, sample.formats) == (12, Counter({"JPEG": 8, "PNG": 4}))
    assert (sample.short_side, sample.long_side, sample.long_shapes) == (9, 12, 0)
    assert (found.missing, sample.unreadable, sample.truncated) == ((), (), ())
    assert (found.duplicates.copies, found.duplicates.across_splits, found.notes) == (0, (), ())


def test_copies_are_found_within_and_across_splits_and_classes(pets: Path) -> None:
    for name in ("train/cat/copy.jpg", "test/cat/leak.jpg", "train/dog/wrong.jpg"):
        (pets / name).write_bytes((pets / "train/cat/0.jpg").read_bytes())
    os.link(pets / "test/dog/0.png", pets / "test/dog/again.png")
    found = inspect_folder(pets).duplicates
    assert found.copies == 4
    assert found.across_splits == ((str(pets / "test/cat/leak.jpg"), str(pets / "train/cat/0.jpg")),)
    assert found.across_classes == ((str(pets / "train/dog/wrong.jpg"), str(pets / "train/cat/0.jpg")),)


def test_the_images_of_val_are_named_as_such(pets: Path) -> None:
    (pets / "test").rename(pets / "val")
    (pets / "val/cat/leak.jpg").write_bytes((pets / "train/cat/0.jpg").read_bytes())
    ((leak, _),) = inspect_folder(pets).duplicates.across_splits
    assert leak == str(pets / "val/cat/leak.jpg")


def test_a_class_in_test_alone_is_listed_and_named(pets: Path, write_image: WriteImage) -> None:
    write_image(pets / "test/red_fox/0.jpg", seed=7)
    found = inspect_folder(pets)
    assert found.listed_classes == found.source.class_names == ("cat", "dog", "red fox")
    assert found.untrained_classes == ("red fox",)
    assert found.source.test is not None
    assert Counter(found.source.test.labels) == {0: 2, 1: 2, 2: 1}


def test_spellings_of_one_class_are_no_differing_splits(pets: Path) -> None:
    (pets / "test/cat").rename(pets / "test/CAT")
    assert inspect_folder(pets).listed_classes is None


def test_what_systems_leave_is_neither_class_nor_image_nor_skipped(pets: Path, write_image: WriteImage) -> None:
    for name in ["__MACOSX/train/cat/._0.jpg", "train/.ipynb_checkpoints/0.jpg", "train/cat/._0.jpg"]:
        write_image(pets / name)
    for name in [".DS_Store", "train/.DS_Store", "train/cat/Thumbs.db", "test/desktop.ini"]:
        (pets / name).write_bytes(b"x")
    found = inspect_folder(pets)
    assert (found.source.class_names, found.listed_classes) == (("cat", "dog"), None)
    assert (sum(found.suffixes.values()), found.notes) == (12, ())


def test_files_of_other_types_are_in_the_notes(pets: Path) -> None:
    for name in ("train/cat/a.psd", "train/list.txt"):
        (pets / name).write_bytes(b"x")
    assert inspect_folder(pets).notes == (f"{pets}: 2 files of other types are skipped: 1 .psd, 1 .txt",)


def encoded(size: tuple[int, int], kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def test_truncated_files_are_told_from_whole_ones_by_their_end(pets: Path) -> None:
    thumbnail = encoded((40, 30), "JPEG")
    exif = Image.Exif()
    exif[0x9286] = thumbnail  # any place before the picture's own data
    whole = {
        "whole.jpg": encoded((300, 200), "JPEG"),
        "progressive.jpg": encoded((300, 200), "JPEG", progressive=True),
        "thumbnail.jpg": encoded((300, 200), "JPEG", exif=exif),
        "trailer.jpg": encoded((300, 200), "JPEG") + b"made by a camera",
        "large.jpg": encoded((900, 900), "JPEG", quality=95),
        "whole.png": encoded((300, 200), "PNG"),
    }
    for name, content in whole.items():
        (pets / "train/cat" / name).write_bytes(content)
        (pets / "train/dog" / name).write_bytes(content[: len(content) * 2 // 3])
    found = inspect_folder(pets).sample
    assert set(found.truncated) == {str(pets / "train/dog" / name) for name in whole}
    assert found.unreadable == ()


def test_files_that_are_no_images_are_named_with_the_reason(pets: Path) -> None:
    cats = pets / "train/cat"
    (cats / "empty.jpg").write_bytes(b"")
    (cats / "text.jpg").write_text("no picture")
    (cats / "gone.jpg").symlink_to(cats / "nowhere.jpg")
    os.mkfifo(cats / "pipe.jpg")
    found = inspect_folder(pets)
    assert {line.partition(": ")[0] for line in found.missing} == {
        str(cats / name) for name in ("empty.jpg", "gone.jpg", "pipe.jpg")
    }
    assert {line.partition(": ")[0] for line in found.sample.unreadable} == {
        str(cats / name) for name in ("empty.jpg", "gone.jpg", "pipe.jpg", "text.jpg")
    }


@pytest.mark.slow
def test_a_strip_is_a_long_shape_and_a_line_of_pixels_and_a_bomb_are_unreadable(pets: Path) -> None:
    Image.new("RGB", (20, 20_000)).save(pets / "train/cat/strip.png")
    Image.new("RGB", (1, 20_000)).save(pets / "train/cat/line.png")
    Image.new("1", (20_000, 20_000)).save(pets / "train/cat/bomb.png")
    found = inspect_folder(pets).sample
    assert found.long_shapes == 1
    unreadable = {line.partition(": ")[0] for line in found.unreadable}
    assert unreadable == {str(pets / "train/cat" / name) for name in ("bomb.png", "line.png")}


def test_class_names_come_from_a_file_with_a_bom_crlf_quotes_and_commas(
    tmp_path: Path, write_image: WriteImage
) -> None:
    for i in range(3):
        write_image(tmp_path / f"photos/deep/{i}.jpg", seed=i)
    (tmp_path / "c.txt").write_bytes('\ufeffred "fox", the\r\n\r\nit\'s, a badger\r\nno\r\n'.encode())
    found = inspect_folder(tmp_path / "photos", tmp_path / "c.txt")
    assert found.source.class_names == ('red "fox", the', "it's, a badger", "no")
    assert found.source.train.labels is None
    assert found.untrained_classes == ()


def test_an_unlabelled_folder_without_class_names_is_refused(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "photos/a.jpg")
    with pytest.raises(DataError):
        inspect_folder(tmp_path / "photos")


def test_class_folders_without_train_are_refused_with_the_remedy(tmp_path: Path, write_image: WriteImage) -> None:
    photos = tmp_path / "photos"
    for name in ("fox", "badger", ".hidden"):
        write_image(photos / name / "a.jpg")
    (photos / "notes").mkdir()
    with pytest.raises(DataError) as caught:
        inspect_folder(photos)
    assert (caught.value.path, caught.value.found) == (photos, "badger, fox")
    assert str(photos / "train") in str(caught.value.remedy)


@pytest.mark.parametrize("trained", [0, 1])
def test_fewer_than_two_training_images_are_refused(pets: Path, trained: int) -> None:
    for path in sorted((pets / "train").rglob("*.jpg"))[trained:]:
        path.unlink()
    with pytest.raises(DataError) as caught:
        inspect_folder(pets)
    assert (caught.value.path, caught.value.found) == (pets, trained)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        inspect_folder(tmp_path / "nothing")
