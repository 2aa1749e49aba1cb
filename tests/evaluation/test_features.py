from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from comkd_cli.data.digits import digits_source
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing, UnreadableImage, prepare
from comkd_cli.errors import ModelError
from comkd_cli.evaluation.features import STORE_FORMAT, Encoder, FeatureStore, store_key

INPUT = Preprocessing(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
IMAGES = digits_source().train.subset(list(range(10)))


class Counting:
    """An encoder that counts its images."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :6]


def store(folder: Path | None) -> FeatureStore:
    return FeatureStore(folder, torch.device("cpu"), 0, lambda event: None)


def test_features_are_those_of_each_image_in_order(tmp_path: Path) -> None:
    found = store(tmp_path).features(Encoder("a", INPUT, Counting()), IMAGES, "it")
    expected = np.stack([prepare(IMAGES.open(i), INPUT).reshape(-1)[:6] for i in range(10)])
    assert np.array_equal(found.values, expected)
    assert found.indices.tolist() == list(range(10))


def test_a_second_call_encodes_no_image(tmp_path: Path) -> None:
    counting = Counting()
    first = store(tmp_path).features(Encoder("a", INPUT, counting), IMAGES, "it")
    second = store(tmp_path).features(Encoder("a", INPUT, counting), IMAGES, "it")
    assert counting.seen == 10
    assert np.array_equal(first.values, second.values)


def test_nothing_is_stored_without_a_folder() -> None:
    counting = Counting()
    for _ in range(2):
        store(None).features(Encoder("a", INPUT, counting), IMAGES, "it")
    assert counting.seen == 20


@pytest.mark.parametrize(
    ("encoder", "images"),
    [
        (Encoder("b", INPUT, Counting()), IMAGES),
        (Encoder("a", replace(INPUT, mean=(0.5, 0.5, 0.5)), Counting()), IMAGES),
        (Encoder("a", INPUT, Counting()), IMAGES.subset([0, 1, 2])),
        (Encoder("a", INPUT, Counting()), replace(IMAGES, open_key=lambda key: Image.new("RGB", (8, 8)))),
        (Encoder("a", INPUT, Counting()), IMAGES.subset([1, 0, *range(2, 10)])),
    ],
    ids=["weights", "pre-processing", "images", "contents", "order"],
)
def test_other_weights_preparation_or_files_are_another_key(encoder: Encoder, images: ImageSet) -> None:
    assert store_key(encoder, images) != store_key(Encoder("a", INPUT, Counting()), IMAGES)


class Opened:
    """The images, counting how often one is opened."""

    def __init__(self) -> None:
        self.times = 0
        self.images = replace(IMAGES, open_key=self._open)

    def _open(self, key: str) -> Image.Image:
        self.times += 1
        return IMAGES.open_key(key)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("size", [8, 16])
def test_models_that_are_asked_for_the_same_images_decode_them_once(size: int, stored: bool, tmp_path: Path) -> None:
    folder = tmp_path if stored else None
    first, second = Encoder("a", INPUT, Counting()), Encoder("b", replace(INPUT, size=size), Counting())
    expected = [store(None).features(encoder, IMAGES, "it").values for encoder in (first, second)]
    opened = Opened()
    shared = replace(store(folder), companions=(second, first))
    found = [shared.features(encoder, opened.images, "it").values for encoder in (first, second)]
    assert opened.times == 2 * len(IMAGES)  # once for their digest
    assert all(np.array_equal(values, alone) for values, alone in zip(found, expected, strict=True))
    assert len(list(tmp_path.iterdir())) == (2 if stored else 0)


def test_a_companion_whose_features_are_stored_is_not_computed_again(tmp_path: Path) -> None:
    first, second = Encoder("a", INPUT, Counting()), Encoder("b", INPUT, counting := Counting())
    store(tmp_path).features(second, IMAGES, "it")
    replace(store(tmp_path), companions=(second,)).features(first, IMAGES, "it")
    assert counting.seen == len(IMAGES)


def test_a_companion_that_fails_costs_the_other_nothing_and_fails_when_it_is_asked_for(tmp_path: Path) -> None:
    def fail(_images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    failing = Encoder("b", INPUT, fail)
    shared = replace(store(tmp_path), companions=(failing,))
    found = shared.features(Encoder("a", INPUT, Counting()), IMAGES, "it")
    assert len(found.indices) == len(IMAGES)
    with pytest.raises(RuntimeError, match="out of memory"):
        shared.features(failing, IMAGES, "it")


def test_unreadable_images_are_stored(tmp_path: Path) -> None:
    def open_key(key: str):  # type: ignore[no-untyped-def]
        if key == IMAGES.keys[3]:
            raise UnreadableImage(f"{key}: cut\noff")
        return IMAGES.open_key(key)

    damaged = replace(IMAGES, open_key=open_key)
    for _ in range(2):
        found = store(tmp_path).features(Encoder("a", INPUT, Counting()), damaged, "it")
        assert found.indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        assert found.unreadable == (f"{IMAGES.keys[3]}: cut off",)


def test_an_unreadable_image_whose_name_is_not_utf8_is_stored(tmp_path: Path) -> None:
    def open_key(key: str):  # type: ignore[no-untyped-def]
        if key == IMAGES.keys[3]:
            raise UnreadableImage("caf\udce9.png: cut off")
        return IMAGES.open_key(key)

    damaged = replace(IMAGES, open_key=open_key)
    store(tmp_path).features(Encoder("a", INPUT, Counting()), damaged, "it")
    kept = store(tmp_path).features(Encoder("a", INPUT, Counting()), damaged, "it")
    assert kept.unreadable[0].endswith(".png: cut off")


def test_the_same_features_are_the_same_bytes_and_older_files_are_read(tmp_path: Path) -> None:
    """Safetensors writes several entries of metadata in an order that changes from file to file."""
    written = set()
    for number in range(12):
        store(tmp_path / str(number)).features(Encoder("a", INPUT, Counting()), IMAGES, "it")
        (file,) = (tmp_path / str(number)).iterdir()
        written.add(file.read_bytes())
    assert len(written) == 1
    save_file(
        {"values": np.zeros((len(IMAGES), 2), np.float32), "indices": np.arange(len(IMAGES))},
        file,
        {"format": STORE_FORMAT, "unreadable": ""},
    )
    assert not store(file.parent).features(Encoder("a", INPUT, Counting()), IMAGES, "it").values.any()


def test_a_damaged_file_is_recomputed(tmp_path: Path) -> None:
    counting = Counting()
    encoder = Encoder("a", INPUT, counting)
    store(tmp_path).features(encoder, IMAGES, "it")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    found = store(tmp_path).features(encoder, IMAGES, "it")
    assert counting.seen == 20
    assert found.values.shape == (10, 6)


def test_an_image_that_has_become_readable_is_added_without_reading_the_others(tmp_path: Path) -> None:
    damaged = {IMAGES.keys[3], IMAGES.keys[7]}

    def open_key(key: str):  # type: ignore[no-untyped-def]
        if key in damaged:
            raise UnreadableImage(f"{key}: missing")
        return IMAGES.open_key(key)

    counting = Counting()
    half_unpacked = replace(IMAGES, open_key=open_key)
    store(tmp_path).features(Encoder("a", INPUT, counting), half_unpacked, "it")
    damaged.discard(IMAGES.keys[3])
    found = store(tmp_path).features(Encoder("a", INPUT, counting), half_unpacked, "it")
    assert counting.seen == 8 + 1
    assert found.indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert found.unreadable == (f"{IMAGES.keys[7]}: missing",)
    damaged.clear()
    whole = store(tmp_path).features(Encoder("a", INPUT, counting), half_unpacked, "it")
    assert np.array_equal(whole.values, store(None).features(Encoder("a", INPUT, Counting()), IMAGES, "it").values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kept", [True, False])
def test_features_that_are_not_numbers_are_refused_each_time(tmp_path: Path, value: float, kept: bool) -> None:
    def encode(images: torch.Tensor) -> torch.Tensor:
        features = images.flatten(1)[:, :6].clone()
        features[3, 2] = value
        return features

    for _ in range(2):
        with pytest.raises(ModelError, match="1 of 10 images are NaN or infinite"):
            store(tmp_path if kept else None).features(Encoder("a", INPUT, encode), IMAGES, "it")
