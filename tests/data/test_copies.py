"""Copies of images: what they hold, and that crops do not depend on whether they were there."""

import io
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from comkd_cli.data import copies as module
from comkd_cli.data.contents import FileContents
from comkd_cli.data.copies import Copies, copy_size, make_copy
from comkd_cli.data.folder import images_below
from comkd_cli.data.loaders import Crops, Steps, TrainingLoader
from comkd_cli.data.named_bytes import NamedBytes
from comkd_cli.data.originals import originals_of
from comkd_cli.data.source import ImageSet
from comkd_cli.data.transforms import training_inputs
from comkd_cli.edge.images import Preprocessing, UnreadableImage, open_image
from comkd_cli.recipe.model import Augment, Mix, RandAugment

INPUT = Preprocessing(size=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CROPS = Augment(min_scale=0.4)
SIDE = 102  # ceil(64 / sqrt(0.4))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> NamedBytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return NamedBytes(f"it.{kind.lower()}", file.getvalue())


def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs of several sizes: resized to the copy's, kept whole, and decoded at a half."""
    home = tmp_path / "photos"
    home.mkdir()
    for number, width in enumerate((640, 180, 320, 500, 610)):
        photo().resize((width, width * 2 // 3)).save(home / f"{number}.jpg", quality=92)
    return home


def with_copies(folder: Path, store: Path, **changes: object) -> ImageSet:
    images = images_below(folder)
    originals = originals_of(images, "contents")
    assert originals is not None
    return replace(images, copies=replace(Copies(store, SIDE, originals), **changes))  # type: ignore[arg-type]


def epoch_of(images: ImageSet, augment: Augment = CROPS) -> list[torch.Tensor]:
    loader = TrainingLoader(images, [INPUT], Crops(augment, 1), Steps(2, 1), 0)
    return [batch.inputs[0] for epoch in range(2) for (batch,) in loader.epoch(epoch)]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def files_of(store: Path) -> Iterator[Path]:
    return (path for path in store.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 3000), (473, 355)),  # 4000 * 355 / 3000 = 473.3
        ((3000, 4000), (355, 473)),
        ((500, 375), (500, 375)),  # up to 1.5 * 355 = 532 an image keeps its size
        ((700, 532), (700, 532)),
        ((710, 533), (473, 355)),
        ((20, 9000), (20, 9000)),
    ],
)
def test_a_copy_has_the_short_side_unless_its_image_is_hardly_larger(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert copy_size(size, 355) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_crops_of_a_copy_are_nearly_those_of_the_photo(kind: str) -> None:
    file = encoded(photo(), kind, quality=95) if kind == "JPEG" else encoded(photo())
    original, copy = open_image(file.getvalue()), make_copy(file, SIDE)
    assert copy.size == (640, 427)
    assert copy.pixels.shape == (102, 153, 3)
    differences, by_chance = [], []
    for seed in range(12):
        crop, reference, another = (
            training_inputs(image, [INPUT], CROPS, number)[0] * 255
            for image, number in ((copy, seed), (original, seed), (original, seed + 100))
        )
        differences.append(float((crop - reference).abs().mean()))
        by_chance.append(float((another - reference).abs().mean()))
    assert np.mean(differences) < 2  # of 255 levels; JPEG of quality 95 changes a crop by as much
    assert np.mean(by_chance) > 20


def test_a_copy_in_the_size_of_its_image_has_its_pixels_and_gives_its_crops() -> None:
    small = photo().resize((150, 100))
    copy = make_copy(encoded(small), SIDE)
    assert copy.is_whole
    assert np.array_equal(copy.pixels, np.asarray(small))
    for seed in range(8):
        crop, reference = (training_inputs(image, [INPUT], CROPS, seed)[0] * 255 for image in (copy, small))
        difference = (crop - reference).abs()
        assert difference.mean() < 0.3
        assert difference.max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(400, 320), (401, 400)])
def test_a_photo_decoded_at_a_half_is_upright(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(photo().resize(size), "JPEG", exif=exif, quality=95)
    upright = open_image(file.getvalue())
    copy = make_copy(file, 60)
    assert copy.size == upright.size
    reference = np.asarray(upright.resize(copy.pixels.shape[1::-1], Image.Resampling.LANCZOS))
    assert np.abs(copy.pixels.astype(int) - reference).mean() < 5  # of 255; turned by 90 degrees it is 50


@pytest.mark.parametrize("size", [(90, 60), (600, 400)])
@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "LA"])
def test_a_copy_shows_what_a_viewer_would(mode: str, size: tuple[int, int]) -> None:
    grey = np.asarray(photo().resize(size).convert("L"))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "P":
        image = photo().resize(size).quantize(32)
    else:
        image = photo().resize(size).convert(mode)
        image.putalpha(Image.fromarray(255 - grey))
    file = encoded(image)
    shown = open_image(file.getvalue())
    copy = make_copy(file, SIDE)
    expected = shown if copy.is_whole else shown.resize(copy.pixels.shape[1::-1], Image.Resampling.LANCZOS)
    assert np.abs(copy.pixels.astype(int) - np.asarray(expected)).mean() < (0.01 if copy.is_whole else 1)


@pytest.mark.parametrize(
    "augment",
    [CROPS, Augment(rand_augment=RandAugment()), Augment(mix=Mix(kind="cutmix", probability=1.0))],
    ids=["crops", "rand_augment", "mix"],
)
def test_crops_have_the_same_bits_from_new_stored_and_unstored_copies(
    folder: Path, tmp_path: Path, augment: Augment
) -> None:
    first = epoch_of(with_copies(folder, tmp_path / "store"), augment)
    stored = list(files_of(tmp_path / "store"))
    assert len(stored) == 5
    made = [path.stat().st_mtime_ns for path in stored]
    assert are_equal(epoch_of(with_copies(folder, tmp_path / "store"), augment), first)
    assert [path.stat().st_mtime_ns for path in stored] == made  # read, not made again
    assert are_equal(epoch_of(with_copies(folder, tmp_path / "none", share=0.0), augment), first)
    assert not list(files_of(tmp_path / "none"))
    assert not are_equal(epoch_of(images_below(folder), augment), first)


def test_later_epochs_do_not_read_the_images(folder: Path, tmp_path: Path) -> None:
    images = with_copies(folder, tmp_path / "store")
    first = epoch_of(images)
    shutil.rmtree(folder)
    assert are_equal(epoch_of(images), first)


def test_an_interrupted_first_epoch_leaves_copies_that_the_next_one_reads(folder: Path, tmp_path: Path) -> None:
    images = with_copies(folder, tmp_path / "store")
    whole = epoch_of(with_copies(folder, tmp_path / "whole"))
    loader = TrainingLoader(images, [INPUT], Crops(CROPS, 1), Steps(2, 1), 0)
    next(loader.epoch(0))
    assert len(list(files_of(tmp_path / "store"))) == 2
    assert are_equal(epoch_of(images), whole)
    assert len(list(files_of(tmp_path / "store"))) == 5


def test_copies_that_are_deleted_while_they_are_read_are_made_again(folder: Path, tmp_path: Path) -> None:
    images = with_copies(folder, tmp_path / "store")
    whole = epoch_of(images)
    loader = TrainingLoader(images, [INPUT], Crops(CROPS, 1), Steps(2, 1), 0)
    seen = []
    for epoch in range(2):
        for (batch,) in loader.epoch(epoch):
            seen.append(batch.inputs[0])
            shutil.rmtree(tmp_path / "store")
    assert are_equal(seen, whole)


def test_writers_of_the_same_copy_at_the_same_time_leave_one_whole_file(folder: Path, tmp_path: Path) -> None:
    images = with_copies(folder, tmp_path / "store")
    copies = images.copies
    assert copies is not None
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(copies.open, [index for index in range(5) for _ in range(8)]))
    for start in range(0, 40, 8):
        assert all(np.array_equal(copy.pixels, found[start].pixels) for copy in found[start : start + 8])
    assert len(list(files_of(tmp_path / "store"))) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_copy_is_made_again(folder: Path, tmp_path: Path, damage: str) -> None:
    images = with_copies(folder, tmp_path / "store")
    whole = epoch_of(images)
    for path in files_of(tmp_path / "store"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        damaged = {"cut": content[:-7], "flipped": content, "empty": b"", "foreign": b"x" * 90_000}
        path.write_bytes(damaged[damage])
    assert are_equal(epoch_of(images), whole)
    assert are_equal(epoch_of(with_copies(folder, tmp_path / "store")), whole)


def test_a_full_disk_and_a_folder_that_cannot_be_written_cost_time_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = epoch_of(with_copies(folder, tmp_path / "whole"))
    (tmp_path / "file").write_text("not a folder")
    assert are_equal(epoch_of(with_copies(folder, tmp_path / "file")), whole)
    monkeypatch.setattr(module, "LEAST_FREE_BYTES", shutil.disk_usage(tmp_path).total)
    assert are_equal(epoch_of(with_copies(folder, tmp_path / "full")), whole)
    assert not list(files_of(tmp_path / "full"))


def test_an_image_that_was_replaced_gets_its_own_copy(folder: Path, tmp_path: Path) -> None:
    images = with_copies(folder, tmp_path / "store")
    photo().rotate(180).resize((500, 400)).save(folder / "0.jpg")
    epoch_of(images)
    assert len(list(files_of(tmp_path / "store"))) == 4  # not under the digest of what was there before
    again = with_copies(folder, tmp_path / "store")
    assert again.copies is not None
    assert again.copies.open(0).size == (500, 400)
    assert len(list(files_of(tmp_path / "store"))) == 5


def test_without_digests_of_contents_files_of_one_size_and_time_are_told_apart_by_path(
    folder: Path, tmp_path: Path
) -> None:
    images = replace(images_below(folder), contents=FileContents(folder, "size_and_time"))
    originals = originals_of(images, "size_and_time")
    assert originals is not None
    assert len({originals.key(index) for index in range(5)}) == 5
    assert originals.has_key(0, b"")
    (folder / "0.jpg").write_bytes(b"changed")
    assert not originals.has_key(0, b"changed")


def test_a_damaged_image_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:2000])
    (folder / "1.jpg").unlink()
    images = with_copies(folder, tmp_path / "store")
    with pytest.raises(UnreadableImage, match=r"0\.jpg"):
        images.open_to_crop(0)
    (folder / "2.jpg").unlink()
    with pytest.raises(UnreadableImage, match=r"\d\.jpg: No such file"):
        images.open_to_crop(1)


def test_an_image_above_the_limit_is_refused_also_where_a_run_with_another_limit_made_its_copy(
    folder: Path, tmp_path: Path
) -> None:
    epoch_of(with_copies(folder, tmp_path / "store"))
    images = with_copies(folder, tmp_path / "store", most_pixels=640 * 426 - 1)  # 0.jpg has 640 x 426
    with pytest.raises(UnreadableImage, match=r"0\.jpg: 640 x 426 pixels: the image size exceeds the limit of 272,639"):
        images.open_to_crop(0)
    images.open_to_crop(1)
