import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.data.folder import check_class_names, find_images, folder_source, images_below, read_class_names
from comkd_cli.errors import DataError
from comkd_cli.predictor import UnreadableImage

WriteImage = Callable[..., Path]
TEMPLATE = "a {}."


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder)]


# --- finding images ------------------------------------------------------------------------------------


def test_images_of_every_kind_are_found_at_any_depth_and_nothing_else(tmp_path: Path, write_image: WriteImage) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.jpeg", "deep/d.webp", "deep/e.bmp"):
        write_image(tmp_path / name)
    for name in ("notes.txt", "model.pt", "png", "f.png.part", "deep/g.tiff"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    assert names(tmp_path) == ["a.JPG", "b.png", "deep/d.webp", "deep/e.bmp", "deep/er/c.jpeg"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path, write_image: WriteImage) -> None:
    for name in ("seen.png", ".hidden.png", "._seen.png", ".cache/a.png", "sub/.thumbs/b.png", "sub/c.png"):
        write_image(tmp_path / name)
    assert names(tmp_path) == ["seen.png", "sub/c.png"]


def test_the_order_does_not_depend_on_the_order_of_writing(tmp_path: Path, write_image: WriteImage) -> None:
    wanted = ["a.png", "b/c.png", "b/d.png", "e/f/g.png"]
    for root, order in ((tmp_path / "one", wanted), (tmp_path / "two", reversed(wanted))):
        for name in order:
            write_image(root / name)
        assert names(root) == wanted


def test_links_to_files_and_folders_are_followed(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "elsewhere/a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "folder").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "file.png").symlink_to(tmp_path / "elsewhere/a.png")
    assert names(root) == ["file.png", "folder/a.png"]


def test_links_that_lead_back_up_end(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "sub/b.png")
    (tmp_path / "sub/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "sub/self").symlink_to(tmp_path / "sub", target_is_directory=True)
    assert names(tmp_path) == ["a.png", "sub/b.png"]


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = images_below(tmp_path)
    assert images.keys == ("gone.png",)
    with pytest.raises(UnreadableImage, match=r"gone\.png"):
        images.open(0)


# --- unlabelled folders --------------------------------------------------------------------------------


def test_a_folder_without_splits_is_unlabelled_training_data(tmp_path: Path, write_image: WriteImage) -> None:
    root = tmp_path / "holiday"
    for seed, name in enumerate(("x.png", "cat/y.png")):
        write_image(root / name, seed)
    source = folder_source(root, ["cat", "dog"], TEMPLATE)
    assert (source.name, source.class_names, source.template) == ("holiday", ("cat", "dog"), TEMPLATE)
    assert (source.train.keys, source.train.labels, source.test) == (("x.png", "cat/y.png"), None, None)


def test_images_open_as_they_were_written(
    tmp_path: Path, write_image: WriteImage, noise: Callable[..., object]
) -> None:
    write_image(tmp_path / "a/b.png", seed=7, size=(5, 4))
    images = pickle.loads(pickle.dumps(images_below(tmp_path)))
    assert np.array_equal(np.asarray(images.open(0)), np.asarray(noise(5, 4, 7)))


def test_an_unlabelled_folder_needs_a_class_list(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"have no classes; give `data\.classes`"):
        folder_source(tmp_path, None, TEMPLATE)


# --- labelled folders ----------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path: Path, write_image: WriteImage) -> Path:
    root = tmp_path / "pets"
    for seed, name in enumerate(
        ("train/dog/1.png", "train/cat/2.png", "train/cat/young/3.png", "test/dog/4.png", "test/cat/5.png")
    ):
        write_image(root / name, seed)
    return root


def labelled(source_keys: tuple[str, ...], labels: tuple[int, ...] | None) -> dict[str, int]:
    assert labels is not None
    return dict(zip(source_keys, labels, strict=True))


def test_sub_folders_are_the_labels_and_their_sorted_names_the_classes(pets: Path) -> None:
    source = folder_source(pets, None, TEMPLATE)
    assert source.class_names == ("cat", "dog")
    assert labelled(source.train.keys, source.train.labels) == {
        "cat/2.png": 0,
        "cat/young/3.png": 0,
        "dog/1.png": 1,
    }
    assert source.test is not None
    assert labelled(source.test.keys, source.test.labels) == {"cat/5.png": 0, "dog/4.png": 1}


def test_a_class_list_gives_the_labels_their_order_and_may_hold_more(pets: Path) -> None:
    source = folder_source(pets, ["dog", "cow", "cat"], TEMPLATE)
    assert source.class_names == ("dog", "cow", "cat")
    assert labelled(source.train.keys, source.train.labels) == {
        "cat/2.png": 2,
        "cat/young/3.png": 2,
        "dog/1.png": 0,
    }


def test_underscores_and_case_do_not_keep_a_folder_from_its_class(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "train/Hot_Dog/1.png")
    write_image(tmp_path / "train/bun/2.png")
    source = folder_source(tmp_path, ["bun", "hot dog"], TEMPLATE)
    assert labelled(source.train.keys, source.train.labels) == {"Hot_Dog/1.png": 1, "bun/2.png": 0}
    assert folder_source(tmp_path, None, TEMPLATE).class_names == ("Hot Dog", "bun")


def test_a_folder_that_is_no_class_is_named(pets: Path) -> None:
    with pytest.raises(DataError, match=r"pets/train: dog is not in the class list"):
        folder_source(pets, ["cat", "cow"], TEMPLATE)


def test_a_class_that_one_split_lacks_is_named_unless_the_classes_are_given(pets: Path) -> None:
    (pets / "test/dog/4.png").unlink()
    (pets / "test/dog").rmdir()
    with pytest.raises(DataError, match=r"pets/test: lacks a sub-folder for dog"):
        folder_source(pets, None, TEMPLATE)
    assert folder_source(pets, ["cat", "dog"], TEMPLATE).test is not None
    (pets / "test/dog").mkdir()
    assert folder_source(pets, None, TEMPLATE).class_names == ("cat", "dog")


def test_a_split_may_be_missing_or_unlabelled(tmp_path: Path, write_image: WriteImage) -> None:
    only_train = tmp_path / "only train"
    for name in ("train/a/1.png", "train/b/2.png"):
        write_image(only_train / name)
    assert folder_source(only_train, None, TEMPLATE).test is None

    mixed = tmp_path / "mixed"
    for name in ("train/1.png", "train/2.png", "test/a/3.png", "test/b/4.png"):
        write_image(mixed / name)
    source = folder_source(mixed, None, TEMPLATE)
    assert (source.train.labels, source.class_names) == (None, ("a", "b"))
    assert source.test is not None
    assert source.test.labels == (0, 1)

    only_test = tmp_path / "only test"
    for name in ("test/a/1.png", "test/b/2.png"):
        write_image(only_test / name)
    source = folder_source(only_test, None, TEMPLATE)
    assert len(source.train) == 0
    assert source.test is not None
    assert len(source.test) == 2


def test_hidden_folders_are_no_classes(pets: Path, write_image: WriteImage) -> None:
    write_image(pets / "train/.git/6.png")
    assert folder_source(pets, None, TEMPLATE).class_names == ("cat", "dog")


@pytest.mark.parametrize("layout", [[], ["train"], ["train/cat", "train/dog"]])
def test_a_folder_without_images_says_which_files_are_read(tmp_path: Path, layout: list[str]) -> None:
    for name in layout:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no images; comkd reads .*\.png"):
        folder_source(tmp_path, ["cat", "dog"], TEMPLATE)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        folder_source(tmp_path / "nowhere", ["a", "b"], TEMPLATE)


def test_folders_that_differ_only_in_case_are_the_same_class_twice(tmp_path: Path, write_image: WriteImage) -> None:
    for name in ("train/cat/1.png", "train/Cat/2.png"):
        write_image(tmp_path / name)
    if len(list((tmp_path / "train").iterdir())) < 2:
        pytest.skip("this file system does not tell the two apart")
    with pytest.raises(DataError, match="repeats 'Cat'"):
        folder_source(tmp_path, None, TEMPLATE)


def test_a_file_name_that_is_not_utf8_is_an_image_like_any_other(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "plain.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    source = folder_source(tmp_path, ["a", "b"], TEMPLATE)
    assert source.train.open(0).size == (12, 9)
    assert source.identity() == folder_source(tmp_path, ["a", "b"], TEMPLATE).identity()


# --- class lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"cat\nhot dog\n", b"cat\r\nhot dog", b"\xef\xbb\xbf cat \n\n\nhot dog\t\n\n"])
def test_a_class_list_is_a_name_a_line_whoever_wrote_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    assert read_class_names(tmp_path / "names.txt") == ["cat", "hot dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\nCat\ncow\nDOG\n", "repeats 'cat' at 1 and 3; 'dog' at 2 and 5"),
        (b"cat\n", "at least 2 classes to tell apart, not 1"),
        (b"\n\n", "at least 2 classes to tell apart, not 0"),
        (b"caf\xe9\ndog\n", "can't be read"),
    ],
)
def test_a_class_list_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_class_names(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_class_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names\.txt: the class list can't be read"):
        read_class_names(tmp_path / "names.txt")


@pytest.mark.parametrize("odd", ["", " ", "two\nlines", "two\rlines", "two\u2028lines", "two\x85lines", "two\x0clines"])
def test_a_class_without_a_name_or_of_two_lines_is_refused_by_its_position(odd: str) -> None:
    with pytest.raises(DataError, match=r"list: class 2 is empty or has a line break"):
        check_class_names(["cat", odd, "dog"], "list")


@given(st.lists(st.text(max_size=5), min_size=2, unique_by=str.casefold))
def test_an_accepted_class_list_survives_a_text_file_with_a_name_a_line(class_names: list[str]) -> None:
    try:
        check_class_names(class_names, "list")
    except DataError:
        assert any(not name.strip() or len(name.splitlines()) != 1 for name in class_names)
    else:
        assert "".join(f"{name}\n" for name in class_names).splitlines() == class_names


def test_val_is_scored_where_there_is_no_test_and_chooses_settings_where_there_is(
    tmp_path: Path, write_image: WriteImage
) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_image(tmp_path / split / name / "1.png")
    source = folder_source(tmp_path, None, "{}")
    assert source.test is not None
    assert source.test.labels == (0, 1)
    assert source.val is None
    for name in ("cat", "dog"):
        write_image(tmp_path / "test" / name / "1.png")
        write_image(tmp_path / "test" / name / "2.png")
    source = folder_source(tmp_path, None, "{}")
    assert source.test is not None
    assert source.val is not None
    assert (len(source.test), len(source.val)) == (4, 2)


@pytest.mark.parametrize("stray", ["bus/1.png", "loose.png", "train/loose.png"])
def test_images_that_no_split_takes_are_named_not_left_out(tmp_path: Path, write_image: WriteImage, stray: str) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png", stray):
        write_image(tmp_path / name)
    with pytest.raises(DataError, match=f"1 images that belong to none: {stray}"):
        folder_source(tmp_path, None, "{}")


def test_a_split_under_another_spelling_is_named(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "Train" / "cat" / "1.png")
    with pytest.raises(DataError, match="should be called train"):
        folder_source(tmp_path, ["cat", "dog"], "{}")


def test_one_class_under_two_spellings_is_one_class(tmp_path: Path, write_image: WriteImage) -> None:
    for split in ("train", "test"):
        for name in ("hot_dog", "cafe\u0301"):  # decomposed, as some file systems write it
            write_image(tmp_path / split / name / "1.png")
    source = folder_source(tmp_path, ["hot dog", "caf\u00e9"], "{}")
    assert sorted(source.train.labels or ()) == [0, 1]
    with pytest.raises(DataError, match="repeats 'hot dog'"):
        check_class_names(["hot dog", "hot_dog"], "list")


def test_a_folder_that_can_not_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "closed"))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="closed: can't be read: Permission denied"):
        folder_source(tmp_path, ["cat", "dog"], "{}")
