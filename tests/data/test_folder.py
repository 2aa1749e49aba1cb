import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from comkd_cli.data.class_names import clean_class_names
from comkd_cli.data.folder import folder_source, images_below
from comkd_cli.data.image_files import find_images
from comkd_cli.data.label_file import LabelFile, read_label_file
from comkd_cli.edge.images import UnreadableImage
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice

WriteImage = Callable[..., Path]
TEMPLATE = "a {}."


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder)]


# --- finding images ------------------------------------------------------------------------------------


def test_images_of_every_kind_are_found_at_any_depth_and_nothing_else(tmp_path: Path, write_image: WriteImage) -> None:
    kinds = ("b.png", "a.JPG", "deep/er/c.jpeg", "deep/d.webp", "deep/e.bmp", "f.TIFF", "g.tif", "h.gif", "i.Avif")
    for name in kinds:
        write_image(tmp_path / name)
    for name in ("j.jfif", "k.JPE"):
        write_image(tmp_path / name, format="JPEG")
    for name in ("notes.txt", "model.pt", "png", "f.png.part", "deep/g.psd"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    found = names(tmp_path)
    assert sorted(found) == sorted([*kinds, "j.jfif", "k.JPE"])
    assert all(images_below(tmp_path).open(i).size == (12, 9) for i in range(len(found)))


def test_hidden_files_and_folders_are_skipped(tmp_path: Path, write_image: WriteImage) -> None:
    for name in ("seen.png", ".hidden.png", "._seen.png", ".cache/a.png", "sub/.thumbs/b.png", "sub/c.png"):
        write_image(tmp_path / name)
    for name in ("__MACOSX/a.png", "sub/@eaDir/b.png", ".ipynb_checkpoints/c.png"):
        write_image(tmp_path / name)
    for name in ("Thumbs.db", "sub/desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    told: list[Event] = []
    assert images_below(tmp_path, told.append).keys == ("seen.png", "sub/c.png")
    assert told == []


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
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path, None, TEMPLATE)
    assert caught.value.path == tmp_path
    assert str(caught.value.remedy).startswith("set `data.classes`")


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
    with pytest.raises(DataError) as caught:
        folder_source(pets, ["cat", "cow"], TEMPLATE)
    assert (caught.value.path, caught.value.found) == (pets / "train", "dog")


def test_a_class_that_one_split_lacks_is_named_unless_the_classes_are_given(pets: Path) -> None:
    (pets / "test/dog/4.png").unlink()
    (pets / "test/dog").rmdir()
    with pytest.raises(DataError) as caught:
        folder_source(pets, None, TEMPLATE)
    assert (caught.value.path, caught.value.found) == (pets / "test", "dog")
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
    with pytest.raises(DataError, match="contains no images") as caught:
        folder_source(tmp_path, ["cat", "dog"], TEMPLATE)
    assert caught.value.path == tmp_path
    assert ".png" in str(caught.value.remedy)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path / "nowhere", ["a", "b"], TEMPLATE)
    assert caught.value.path == tmp_path / "nowhere"


def test_folders_that_differ_only_in_case_are_the_same_class_twice(tmp_path: Path, write_image: WriteImage) -> None:
    for name in ("train/cat/1.png", "train/Cat/2.png"):
        write_image(tmp_path / name)
    if len(list((tmp_path / "train").iterdir())) < 2:
        pytest.skip("this file system does not tell the two apart")
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path, None, TEMPLATE)
    assert (caught.value.path, caught.value.found) == (tmp_path / "train", "Cat, cat")


def test_a_file_name_that_is_not_utf8_is_an_image_like_any_other(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "plain.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    source = folder_source(tmp_path, ["a", "b"], TEMPLATE)
    assert source.train.open(0).size == (12, 9)
    assert source.identity() == folder_source(tmp_path, ["a", "b"], TEMPLATE).identity()


# --- splits and names ---------------------------------------------------------------------------------


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
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path, None, "{}")
    assert (caught.value.path, caught.value.found) == (tmp_path, stray)


def test_a_split_under_another_spelling_is_named(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "Train" / "cat" / "1.png")
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path, ["cat", "dog"], "{}")
    assert str(caught.value) == (
        f"{tmp_path / 'Train'}: looks like a split with another name (allowed: train, val, test); "
        "rename it to train, or move it out of the folder"
    )


def test_one_class_under_two_spellings_is_one_class(tmp_path: Path, write_image: WriteImage) -> None:
    for split in ("train", "test"):
        for name in ("hot_dog", "cafe\u0301"):  # decomposed, as some file systems write it
            write_image(tmp_path / split / name / "1.png")
    source = folder_source(tmp_path, ["hot dog", "caf\u00e9"], "{}")
    assert sorted(source.train.labels or ()) == [0, 1]
    with pytest.raises(DataError, match="'hot dog' at 1 and 2"):
        clean_class_names(["hot dog", "hot_dog"], "list")


def test_a_folder_that_can_not_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "closed"))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path, ["cat", "dog"], "{}")
    assert (caught.value.path, caught.value.found) == (str(tmp_path / "closed"), "Permission denied")


# --- what would be wrong and say nothing ---------------------------------------------------------------


def texts(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Notice)]


def test_files_of_other_types_are_counted_by_suffix_wherever_they_lie(pets: Path) -> None:
    for name in (
        "readme.md",
        "train/a.PSD",
        "train/cat/b.psd",
        "train/cat/young/c.psd",
        "test/dog/noext",
        "x/y.txt",
    ):
        (pets / name).parent.mkdir(exist_ok=True)
        (pets / name).write_bytes(b"x")
    told: list[Event] = []
    source = folder_source(pets, None, TEMPLATE, told.append)
    assert len(source.train) == 3
    assert texts(told) == [f"{pets}: 6 files of other types are skipped: 3 .psd, 1 .md, 1 .txt, 1 without a suffix"]


@pytest.mark.parametrize("junk", ["__MACOSX", "@eaDir", ".ipynb_checkpoints", "__pycache__", "$RECYCLE.BIN"])
def test_what_systems_leave_is_no_class_and_no_split(pets: Path, write_image: WriteImage, junk: str) -> None:
    for place in (pets, pets / "train", pets / "train/cat"):
        write_image(place / junk / "1.png")
    source = folder_source(pets, None, TEMPLATE)
    assert (source.class_names, len(source.train)) == (("cat", "dog"), 3)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("training", "train"),
        ("TRAIN", "train"),
        ("train_set", "train"),
        ("Testing", "test"),
        ("test-images", "test"),
        ("validation", "val"),
        ("valid", "val"),
        ("dev", "val"),
        ("eval", "val"),
        ("train2017", "train"),
        ("train_data", "train"),
        ("images_test", "test"),
        ("Val Dataset 2", "val"),
    ],
)
@pytest.mark.parametrize("beside", ["train/cat/1.png", "loose/1.png"])
def test_splits_under_other_names_are_not_pooled_as_unlabelled(
    tmp_path: Path, write_image: WriteImage, name: str, meant: str, beside: str
) -> None:
    write_image(tmp_path / beside)
    write_image(tmp_path / name / "cat/1.png")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system does not tell the two apart")
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path, ["cat", "dog"], TEMPLATE)
    assert caught.value.path == tmp_path / name
    assert str(caught.value.remedy).startswith(f"rename it to {meant}, ")


@pytest.mark.parametrize("name", ["test tube", "trains", "training shoes", "2017", "images", "data_set"])
def test_other_folder_names_are_no_splits(tmp_path: Path, write_image: WriteImage, name: str) -> None:
    write_image(tmp_path / name / "1.png")
    assert len(folder_source(tmp_path, ["cat", "dog"], TEMPLATE).train) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(60)
def test_a_pipe_and_a_device_among_the_images_are_unreadable_and_never_waited_for(pets: Path) -> None:
    os.mkfifo(pets / "train/cat/pipe.png")
    (pets / "train/cat/zero.png").symlink_to("/dev/zero")
    images = folder_source(pets, None, TEMPLATE).train
    assert images.digest != ""
    for name in ("pipe", "zero"):
        with pytest.raises(UnreadableImage, match=rf"{name}\.png: is not a regular file"):
            images.open(images.keys.index(f"cat/{name}.png"))


def test_a_class_or_a_folder_without_images_may_be_called_as_a_split_is(
    tmp_path: Path, write_image: WriteImage
) -> None:
    for name in ("train/training/1.png", "train/test/2.png", "test/training/3.png", "test/test/4.png"):
        write_image(tmp_path / name)
    (tmp_path / "Testing").mkdir()
    assert folder_source(tmp_path, None, TEMPLATE).class_names == ("test", "training")


@pytest.mark.parametrize("splits", [("train", "test"), ("Training", "validation")])
def test_splits_further_down_are_not_pooled_as_unlabelled(
    tmp_path: Path, write_image: WriteImage, splits: tuple[str, str]
) -> None:
    for split in splits:
        write_image(tmp_path / "pets/images" / split / "cat/1.png")
    with pytest.raises(DataError) as caught:
        folder_source(tmp_path, ["cat", "dog"], TEMPLATE)
    assert (caught.value.path, caught.value.found) == (tmp_path / "pets/images", ", ".join(splits))
    # A folder of pictures of trains is no split, where nothing beside it is one.
    write_image(tmp_path / "vehicles/train/1.png")
    assert len(folder_source(tmp_path / "vehicles", ["cat", "dog"], TEMPLATE).train) == 1


def test_two_folders_of_one_class_are_refused_in_a_split_and_one_class_between_splits(
    tmp_path: Path, write_image: WriteImage
) -> None:
    for name in ("train/red_panda/1.png", "train/fox/1.png", "test/Red panda/2.png", "test/fox/2.png"):
        write_image(tmp_path / name)
    source = folder_source(tmp_path, None, TEMPLATE)
    assert source.class_names == ("fox", "red panda")
    assert source.test is not None
    assert labelled(source.test.keys, source.test.labels) == {"Red panda/2.png": 1, "fox/2.png": 0}
    assert source.prompts == folder_source(tmp_path, ["fox", "red_panda"], TEMPLATE).prompts
    write_image(tmp_path / "train/red panda/3.png")
    for classes in (None, ["fox", "red_panda"]):
        with pytest.raises(DataError) as caught:
            folder_source(tmp_path, classes, TEMPLATE)
        assert (caught.value.path, caught.value.found) == (tmp_path / "train", "red panda, red_panda")


def test_class_folders_that_are_one_by_a_link_are_refused(pets: Path) -> None:
    (pets / "train/fox").symlink_to(pets / "train/cat", target_is_directory=True)
    with pytest.raises(DataError) as caught:
        folder_source(pets, ["cat", "dog", "fox"], TEMPLATE)
    assert (caught.value.path, caught.value.found) == (pets / "train", "cat, fox")


def test_a_link_in_a_class_that_leads_back_up_brings_no_other_class(pets: Path) -> None:
    (pets / "train/cat/up").symlink_to(pets / "train", target_is_directory=True)
    (pets / "train/cat/top").symlink_to(pets, target_is_directory=True)
    source = folder_source(pets, None, TEMPLATE)
    assert source.train.keys == ("cat/2.png", "cat/young/3.png", "dog/1.png")


def test_splits_that_are_one_folder_by_a_link_are_told(pets: Path) -> None:
    (pets / "val").symlink_to(pets / "train", target_is_directory=True)
    told: list[Event] = []
    folder_source(pets, None, TEMPLATE, told.append)
    assert texts(told) == [f"{pets}: train and val are the same folder through a link, so they hold the same images"]


def test_a_split_that_serves_nothing_is_told(pets: Path, write_image: WriteImage) -> None:
    write_image(pets / "val/1.png")
    told: list[Event] = []
    assert folder_source(pets, None, TEMPLATE, told.append).val is None
    (pets / "val/1.png").unlink()
    folder_source(pets, None, TEMPLATE, told.append)
    assert texts(told) == [
        f"{pets / 'val'}: is not used, because it has no class folders and test/ has images",
        f"{pets / 'val'}: contains no images",
    ]


def test_a_folder_name_that_cannot_be_a_class_is_named(pets: Path, write_image: WriteImage) -> None:
    write_image(pets / "train/a\nfox/1.png")
    with pytest.raises(DataError) as caught:
        folder_source(pets, None, TEMPLATE)
    assert (caught.value.path, caught.value.found) == (pets / "train", repr("a\nfox"))


# --- labels for a part of the images -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled"])
def test_train_may_hold_images_without_labels_beside_its_classes(
    pets: Path, write_image: WriteImage, name: str
) -> None:
    write_image(pets / "train" / name / "deep/6.png")
    source = folder_source(pets, None, TEMPLATE)
    assert source.class_names == ("cat", "dog")
    assert labelled(source.train.keys, source.train.labels) == {
        "cat/2.png": 0,
        "cat/young/3.png": 0,
        "dog/1.png": 1,
        f"{name}/deep/6.png": -1,
    }
    assert source.train.labelled.keys == ("cat/2.png", "cat/young/3.png", "dog/1.png")
    assert source.train.labelled.labels == (0, 0, 1)
    listed = folder_source(pets, ["cat", "dog", name], TEMPLATE).train
    assert labelled(listed.keys, listed.labels)[f"{name}/deep/6.png"] == 2


def test_unlabelled_images_outside_train_are_still_in_no_split(pets: Path, write_image: WriteImage) -> None:
    write_image(pets / "unlabelled/6.png")
    with pytest.raises(DataError) as caught:
        folder_source(pets, None, TEMPLATE)
    assert caught.value.found == "unlabelled/6.png"
    assert "train/unlabelled/" in str(caught.value.remedy)


def label_file(folder: Path, *rows: str) -> LabelFile:
    path = folder / "labels.csv"
    path.write_text("\n".join(["path,class", *rows]))
    return read_label_file(path)


def test_a_label_file_labels_part_of_an_unlabelled_folder(tmp_path: Path, write_image: WriteImage) -> None:
    for name in ("a.png", "cat/b.png", "cat/c.png"):
        write_image(tmp_path / name)
    labels = label_file(tmp_path, "cat/b.png,dog", "a.png,cat")
    told: list[Event] = []
    source = folder_source(tmp_path, None, TEMPLATE, told.append, labels)
    assert told == []
    assert source.class_names == ("cat", "dog")
    assert labelled(source.train.keys, source.train.labels) == {"a.png": 0, "cat/b.png": 1, "cat/c.png": -1}
    assert folder_source(tmp_path, ["dog", "cow", "cat"], TEMPLATE, labels=labels).train.labels == (2, 0, -1)


def test_a_label_file_replaces_the_folders_of_train_and_not_those_of_test(pets: Path) -> None:
    told: list[Event] = []
    labels = label_file(pets, "train/cat/2.png,cat", "test/dog/4.png,dog")
    source = folder_source(pets, None, TEMPLATE, told.append, labels)
    assert labelled(source.train.keys, source.train.labels) == {"cat/2.png": 0, "cat/young/3.png": -1, "dog/1.png": -1}
    assert source.test is not None
    assert labelled(source.test.keys, source.test.labels) == {"cat/5.png": 0, "dog/4.png": 1}
    assert any("1 lines name images of test/" in text for text in texts(told))
    with pytest.raises(DataError) as caught:
        folder_source(pets, None, TEMPLATE, labels=label_file(pets, "train/cat/2.png,fox"))
    assert (caught.value.field, caught.value.found, caught.value.allowed) == ("line 2", "fox", "cat, dog")
    with pytest.raises(DataError, match="labels no training image"):
        folder_source(pets, None, TEMPLATE, labels=label_file(pets, "test/cat/5.png,cat"))
