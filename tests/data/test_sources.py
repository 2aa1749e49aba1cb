from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from comkd_cli.data.sources import locate, open_source
from comkd_cli.edge.images import UnreadableImage
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice
from comkd_cli.recipe.model import Data

WriteImage = Callable[..., Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, away from the data root."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_the_digits_need_no_folder(root: Path) -> None:
    source = open_source(Data(dataset="digits", template="the {}"), root / "nowhere")
    assert (source.name, len(source.train), source.prompts[9]) == ("digits", 1437, "the 9")


def test_a_folder_is_looked_for_in_the_current_directory_then_below_the_data_root(
    here: Path, root: Path, write_image: WriteImage
) -> None:
    data = Data(folder="pictures", classes=("a", "b"))
    write_image(root / "pictures/far.png")
    assert open_source(data, root).train.keys == ("far.png",)
    write_image(here / "pictures/near.png")
    assert open_source(data, root).train.keys == ("near.png",)


def test_an_absolute_folder_and_one_from_home_are_taken_as_they_are(
    here: Path, root: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(root / "pictures/a.png")
    monkeypatch.setenv("HOME", str(root))
    for folder in (str(root / "pictures"), "~/pictures"):
        source = open_source(Data(folder=folder, classes=("a", "b")), here / "nowhere")
        assert (source.train.keys, source.name) == (("a.png",), "pictures")


def test_a_label_file_is_looked_for_in_the_folder_last_and_the_labelled_images_are_counted(
    here: Path, root: Path, write_image: WriteImage
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(root / "pets" / name)
    data = Data(folder="pets", labels="labels.csv")
    with pytest.raises(DataError) as caught:
        open_source(data, root)
    assert caught.value.field == "data.labels"
    expected = {root / "pets": (-1, 0, 1), root: (0, 1, -1), here: (1, -1, 0)}
    for folder, labels in expected.items():
        before = "pets/" if folder == root else ""  # paths count from the file's folder or from the images'
        rows = [f"{before}{name}.png,{'xy'[label]}" for name, label in zip("abc", labels, strict=True) if label >= 0]
        (folder / "labels.csv").write_text("\n".join(["path,class", *rows]))
        told: list[Event] = []
        source = open_source(data, root, report=told.append)
        assert (source.train.labels, source.class_names) == (labels, ("x", "y"))
        assert Notice("pets: 2 of 3 training images have labels") in told


def test_classes_come_from_the_list_the_file_or_the_folders(here: Path, root: Path, write_image: WriteImage) -> None:
    for name in ("train/dog/1.png", "train/cat/2.png"):
        write_image(root / "pets" / name, seed=len(name))
    (root / "names.txt").write_text("dog\ncow\ncat\n")
    expected = {None: ("cat", "dog"), ("dog", "cat"): ("dog", "cat"), "names.txt": ("dog", "cow", "cat")}
    for classes, found in expected.items():
        assert open_source(Data(folder="pets", classes=classes), root).class_names == found


def test_the_template_of_a_folder_is_clips_own_unless_given(root: Path, write_image: WriteImage) -> None:
    write_image(root / "pets/1.png")
    pets = str(root / "pets")
    assert open_source(Data(folder=pets, classes=("cat", "dog")), root).prompts[0] == "a photo of a cat."
    own = Data(folder=pets, classes=("cat", "dog"), template="one {}")
    assert open_source(own, root).prompts == ["one cat", "one dog"]


def test_several_templates_and_descriptions_are_prompts_of_the_classes(
    here: Path, root: Path, write_image: WriteImage
) -> None:
    write_image(root / "pets/1.png")
    (root / "prompts.yaml").write_text("red_panda: a small red bear\n")
    data = {"folder": "pets", "classes": ("cat", "red_panda")}
    source = open_source(Data(**data, templates=("one {}", "two {}"), prompts="prompts.yaml"), root)
    assert source.template == "one {}"
    assert [source.wording.of(name) for name in source.class_names] == [("one cat", "two cat"), ("a small red bear",)]
    (here / "prompts.yaml").write_text("cat: nearer than the data root\n")
    source = open_source(Data(**data, prompts="prompts.yaml"), root)
    assert source.prompts == ["nearer than the data root", "a photo of a red panda."]
    ensemble = open_source(Data(**data, templates="openai"), root)
    assert ensemble.identity()["templates"][:2] == ["a bad photo of a {}.", "a photo of many {}."]
    with pytest.raises(DataError) as caught:
        open_source(Data(**data, prompts="nowhere.yaml"), root)
    assert caught.value.field == "data.prompts"


def test_a_single_template_in_a_list_is_the_same_source_as_the_template(root: Path) -> None:
    single = open_source(Data(dataset="digits", template="the {}"), root)
    assert open_source(Data(dataset="digits", templates=("the {}",)), root).identity() == single.identity()


def test_a_path_that_is_nowhere_is_told_with_its_field_and_every_place_looked_at(here: Path, root: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(Data(folder="pets", classes=("a", "b")), root)
    assert (caught.value.field, caught.value.found) == ("data.folder", f"pets, {root / 'pets'}")
    (here / "pets").mkdir()
    with pytest.raises(DataError) as caught:
        open_source(Data(folder="pets", classes="names.txt"), root)
    assert caught.value.field == "data.classes"
    with pytest.raises(DataError) as caught:
        locate("/no/where", root, "field")
    assert str(caught.value) == ("field: no such file or folder: /no/where; correct the path, or set --data-root")


def test_a_list_with_a_class_twice_is_told_as_the_recipes(root: Path, write_image: WriteImage) -> None:
    write_image(root / "pets/1.png")
    with pytest.raises(DataError) as caught:
        open_source(Data(folder=str(root / "pets"), classes=("cat", "dog", "CAT")), root)
    assert (caught.value.field, caught.value.found) == ("data.classes", "'cat' at 1 and 3")


def test_a_list_a_file_and_folders_give_the_same_prompts(root: Path, write_image: WriteImage) -> None:
    for name in ("train/red_panda/1.png", "train/cat/2.png"):
        write_image(root / "pets" / name)
    (root / "names.txt").write_text("cat\nred_panda\n")
    for classes in (None, ("cat", "red_panda"), ("cat\n", " red panda"), "names.txt"):
        source = open_source(Data(folder="pets", classes=classes), root)
        assert source.prompts == ["a photo of a cat.", "a photo of a red panda."]
        assert dict(zip(source.train.keys, source.train.labels or (), strict=True)) == {
            "cat/2.png": 0,
            "red_panda/1.png": 1,
        }


def test_classes_without_images_are_one_notice_that_names_them(root: Path, write_image: WriteImage) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "train/fox/3.png", "test/cat/4.png", "test/dog/5.png"):
        write_image(root / "pets" / name)
    (root / "pets/test/fox").mkdir()
    told: list[Event] = []
    source = open_source(Data(folder="pets"), root, report=told.append)
    assert told == [Notice("pets: no test images of: fox (the mean per class is over 2 of 3)")]
    told.clear()
    # A list in another order than the folders', with a name that has none: labels follow the names.
    source = open_source(Data(folder="pets", classes=("owl", "fox", "dog", "cat")), root, report=told.append)
    assert source.train.labels == (3, 2, 1)
    assert told == [
        Notice("pets: no training images of: owl; no test images of: owl, fox (the mean per class is over 2 of 4)")
    ]


def test_shards_are_looked_for_as_a_folder_is_and_indexed_below_the_runs(
    here: Path, root: Path, write_image: WriteImage
) -> None:
    picture = write_image(here / "x.png").read_bytes()
    for place in (root, here):
        with webdataset.TarWriter(str(place / "set-0.tar")) as writer:
            writer.write({"__key__": place.name, "png": picture})
    (root / "names.txt").write_text("cat\ndog\n")
    data = Data(shards="set-{0..0}.tar", classes="names.txt", template="one {}")
    source = open_source(data, root, here / "runs")
    assert (list(source.train.keys), source.prompts, source.name) == (["here"], ["one cat", "one dog"], "set")
    (here / "set-0.tar").unlink()
    assert list(open_source(data, root, here / "runs").train.keys) == ["root"]
    assert len(list((here / "runs/shards").glob("*/index.json"))) == 2
    with pytest.raises(DataError) as caught:
        open_source(Data(shards="set-{0..0}.tar", classes="no.txt"), root)
    assert caught.value.field == "data.classes"


@pytest.mark.parametrize("where", ["folder", "shards"])
def test_an_image_above_the_recipes_limit_of_pixels_is_unreadable(
    root: Path, write_image: WriteImage, where: str
) -> None:
    image = write_image(root / "images/large.png", size=(12, 9))
    write_image(root / "images/small.png", size=(4, 3))
    if where == "folder":
        data = Data(folder="images", classes=("a", "b"), image_limit_pixels=107)
    else:
        with webdataset.TarWriter(str(root / "set-0.tar")) as writer:
            for name in ("large", "small"):
                writer.write({"__key__": name, "png": image.with_stem(name).read_bytes()})
        data = Data(shards=str(root / "set-0.tar"), classes=("a", "b"), image_limit_pixels=107)
    source = open_source(data.model_copy(update={"holdout_percent": 0.0}), root, root / "runs")
    for images in (source.train, source.train.subset([0, 1])):
        assert images.open(1).size == (4, 3)
        with pytest.raises(UnreadableImage, match=r"large.*: 12 x 9 pixels: .* limit of 107 pixels"):
            images.open(0)
