"""The images in each part of an export, from images whose content is known."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comkd_cli.bundles.parts import Part, Parts, PartSize, Pool, read_parts
from comkd_cli.data.folder import images_below
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing, UnreadableImage
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice

TINY = Preprocessing(4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def quietly(event: object) -> None:
    pass


def painted(shows: Sequence[int], labels: bool = False, prefix: str = "") -> ImageSet:
    """Images of 4 x 4 pixels; equal numbers have equal pixels, and a negative number cannot be read."""
    keys = tuple(f"{prefix}{position:04d}.png" for position in range(len(shows)))

    def open_key(key: str) -> Image.Image:
        number = shows[keys.index(key)]
        if number < 0:
            raise UnreadableImage(f"{key}: broken")
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return ImageSet(keys, tuple(number % 5 for number in shows) if labels else None, open_key)


def shown(part: Part) -> set[bytes]:
    """Digests of a part's images."""
    return {hashlib.sha256(image.tobytes()).digest() for image in part.images}


def parts_of(gate: ImageSet, others: ImageSet | None = None, most: int = 512, int8: bool = True) -> Parts:
    if others is None:
        pool = Pool(gate, "training")
        return read_parts(pool, pool, TINY, most, int8, quietly)
    return read_parts(Pool(gate, "test"), Pool(others, "training"), TINY, most, int8, quietly)


def assert_disjoint(parts: Parts) -> None:
    gate, choose, calibrate = map(shown, (parts.gate, parts.choose, parts.calibrate))
    assert not gate & choose
    assert not gate & calibrate
    assert not choose & calibrate


NUMBERS = st.lists(st.integers(-1, 60), min_size=1, max_size=90)


@pytest.mark.slow
@given(NUMBERS, NUMBERS, st.integers(1, 40))
def test_no_part_shows_what_another_one_shows(test: list[int], train: list[int], most: int) -> None:
    for pools in ((painted(test, labels=True), painted(train)), (painted(train), None)):
        if max(test) < 0 or max(train) < 0:
            continue
        parts = parts_of(*pools, most=most)
        assert_disjoint(parts)
        assert 0 < len(parts.gate.images) <= most
        assert (parts.too_few is None) == (len(parts.choose.images) > 0) == (len(parts.calibrate.images) > 0)
        if parts.too_few is None:
            assert parts.gate.different >= 8
            assert len(parts.calibrate.images) >= 16
            assert len(parts.choose.images) >= 8


def test_a_gate_of_test_images_is_all_of_them_with_their_labels() -> None:
    parts = parts_of(painted(range(60), labels=True), painted(range(100, 300)))
    assert parts.gate.size == PartSize(60, 60, "test", True)
    assert parts.calibrate.size == PartSize(144, 144, "training", False)
    assert parts.choose.size == PartSize(48, 48, "training", False)
    assert parts.gate.labels is not None
    assert parts.gate.labels.tolist() == [number % 5 for number in range(60)]
    assert (parts.unreadable, parts.too_few) == (0, None)


def test_training_images_that_are_test_images_too_are_not_calibrated_on() -> None:
    parts = parts_of(painted(range(30), labels=True), painted(range(100), labels=True))
    assert len(parts.calibrate.images) + len(parts.choose.images) == 70
    assert_disjoint(parts)


def test_one_pool_is_split_in_three_and_has_no_labels() -> None:
    parts = parts_of(painted(range(80), labels=True))
    assert [len(part.images) for part in (parts.choose, parts.calibrate, parts.gate)] == [10, 30, 40]
    assert len(shown(parts.gate) | shown(parts.choose) | shown(parts.calibrate)) == 80
    assert parts.gate.labels is None  # the student's teacher was trained with these labels
    assert parts.gate.size.words(scored=True) == "40 training images, not held out"


def test_a_large_pool_gives_the_whole_parts() -> None:
    parts = parts_of(painted(range(900)))
    assert [len(part.images) for part in (parts.choose, parts.calibrate, parts.gate)] == [48, 144, 512]


def test_without_int8_all_images_go_to_the_gate() -> None:
    parts = parts_of(painted(range(40)), int8=False)
    assert [len(part.images) for part in (parts.gate, parts.choose, parts.calibrate)] == [40, 0, 0]


def test_labelled_copies_count_in_the_gate_as_in_a_score_but_not_as_different_images() -> None:
    parts = parts_of(painted([1, 1, 1, 2, 3], labels=True), painted(range(100, 140)), int8=False)
    assert parts.gate.size == PartSize(5, 3, "test", True)
    assert parts.gate.size.words() == "5 test images (3 different ones)"
    assert parts_of(painted([1, 1, 1, 2, 3]), int8=False).gate.size == PartSize(3, 3, "training", False)


def test_the_same_picture_in_two_formats_is_one_image(tmp_path: Path, noise: Callable[..., Image.Image]) -> None:
    for seed in range(40):
        noise(9, 9, seed).save(tmp_path / f"{seed}.png")
        noise(9, 9, seed).save(tmp_path / f"copy of {seed}.bmp")
    pool = Pool(images_below(tmp_path), "given")
    parts = read_parts(pool, pool, TINY, 512, True, quietly)
    assert sum(len(part.images) for part in (parts.gate, parts.choose, parts.calibrate)) == 40
    assert_disjoint(parts)


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_the_order_in_which_a_folder_is_listed_does_not_matter(int8: bool) -> None:
    images = painted(range(1500))
    order = np.random.default_rng(0).permutation(1500).tolist()
    first, second = parts_of(images, int8=int8), parts_of(images.subset(order), int8=int8)
    for name in ("gate", "choose", "calibrate"):
        assert shown(getattr(first, name)) == shown(getattr(second, name))
        assert shown(getattr(first, name)) == shown(getattr(parts_of(images, int8=int8), name))


def test_parts_of_images_sorted_by_class_hold_every_class() -> None:
    images = painted(sorted(range(1500), key=lambda number: number % 5), labels=True)
    parts = parts_of(painted(range(2000, 2010), labels=True), images)
    classes = [number % 5 for number in range(1500)]
    seen = {hashlib.sha256(image.tobytes()).digest() for image in parts.choose.images}
    everything = read_parts(Pool(images, "test"), Pool(images, "test"), TINY, 1500, False, quietly).gate
    assert everything.labels is not None
    assert sorted(everything.labels.tolist()) == sorted(classes)
    held = {
        int(label)
        for image, label in zip(everything.images, everything.labels, strict=True)
        if hashlib.sha256(image.tobytes()).digest() in seen
    }
    assert held == set(range(5))


def test_unreadable_images_are_counted_named_and_replaced() -> None:
    events: list[Event] = []
    pool = Pool(painted([-1] * 30 + list(range(30))), "given")
    parts = read_parts(pool, pool, TINY, 20, False, events.append)
    assert len(parts.gate.images) == 20
    assert parts.unreadable > 0
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text.startswith(
        f"{parts.unreadable} of the images given with --images could not be read and are skipped:"
    )
    assert notice.text.count("broken") == min(parts.unreadable, 10)


@pytest.mark.parametrize("shows", [[], [-1, -1]])
def test_a_gate_without_images_is_an_error(shows: list[int]) -> None:
    for int8 in (False, True):
        with pytest.raises(DataError, match="none of the images for the checks could be read") as caught:
            parts_of(painted(shows), int8=int8)
        assert caught.value.remedy == "provide others with --images"


@pytest.mark.parametrize(
    ("test", "train", "most", "message"),
    [
        (None, 31, 512, r"at least 32 different images, in three parts .* only 31 training images"),
        (None, 32, 512, None),
        (None, 400, 7, r"at least 8 images for its gate; raise --check-images"),
        (7, 400, 512, r"at least 8 different images for its gate, but only 7 test images"),
        (8, 400, 7, r"at least 8 different images for its gate, but only 7 test images"),
        (8, 23, 512, r"at least 24 different images in addition to those of its gate .* only 23 other training images"),
        (8, 24, 512, None),
    ],
)
def test_too_few_images_for_int8_are_refused_with_the_least_number(
    test: int | None, train: int, most: int, message: str | None
) -> None:
    training = painted(range(1000, 1000 + train))
    parts = parts_of(training, most=most) if test is None else parts_of(painted(range(test)), training, most=most)
    if message is None:
        assert parts.too_few is None
        return
    assert parts.too_few is not None
    assert re.search(message, parts.too_few)
    assert len(parts.choose.images) == len(parts.calibrate.images) == 0
    assert len(parts.gate.images) == min(most, test or train)  # which the other precisions have


def test_copies_do_not_make_up_for_images() -> None:
    parts = parts_of(painted(list(range(20)) * 5))
    assert parts.too_few is not None
    assert "only 20 training images" in parts.too_few


def test_images_of_shards_are_taken_by_their_rank() -> None:
    class Ranked(ImageSet):
        @property
        def rows(self) -> np.ndarray:
            return np.arange(len(self))[::-1].copy()

    plain = painted(range(40))
    ranked = Ranked(plain.keys, None, plain.open_key)
    assert shown(parts_of(ranked, int8=False).gate) == shown(parts_of(plain, int8=False).gate)


def test_one_image_is_in_the_singular() -> None:
    size = PartSize(1, 1, "given", False)
    assert size.words() == "1 image given with --images"
    assert replace(size, images=2, origin="test").words() == "2 test images (1 different ones)"


def test_held_out_images_are_the_gates_with_their_labels_and_are_called_so() -> None:
    gate = Pool(painted(range(12), labels=True), "test", held_out=True)
    parts = read_parts(gate, Pool(painted(range(100, 130)), "training"), TINY, 512, True, quietly)
    assert parts.gate.labels is not None
    assert parts.gate.size.words(scored=True) == "12 held-out images"
    assert (parts.gate.size.held_out, parts.calibrate.size.held_out) == (True, False)
    few = read_parts(replace(gate, images=painted(range(3))), gate, TINY, 512, True, quietly)
    assert "only 3 held-out images" in str(few.too_few)
