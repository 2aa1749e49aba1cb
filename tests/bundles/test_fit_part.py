"""The part that temperature and threshold are fitted on, from images whose content is known."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comkd_cli.bundles.fit_part import LEAST_TO_FIT, read_negatives, with_fit_part
from comkd_cli.bundles.parts import Part, Parts
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice

TINY = Preprocessing(4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def part(numbers: Sequence[int]) -> Part:
    """Images that show numbers; equal numbers are copies."""
    images = np.asarray(numbers, np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 3, 2, 2), np.float32)
    return Part(images, "test", np.asarray(numbers, np.int64), len(set(numbers)))


def divided(numbers: Sequence[int], most: int = 512) -> Parts:
    empty = part([])
    return with_fit_part(Parts(part(numbers), empty, empty, 0, None), most)


def numbers_of(images: Part | None) -> list[int]:
    assert images is not None
    shown = images.images[:, 0, 0, 0].astype(int).tolist()
    assert images.labels is not None
    assert images.labels.tolist() == shown
    assert images.different == len(set(shown))
    return [int(number) for number in shown]


@given(st.lists(st.integers(0, 400), max_size=500), st.integers(1, 600))
def test_no_image_is_on_both_sides_and_the_gate_is_not_larger_than_it_may_be(numbers: list[int], most: int) -> None:
    parts = divided(numbers, most)
    gate = numbers_of(parts.gate)
    assert len(gate) <= most
    assert (parts.fit is None) == (parts.no_fit is not None)
    if parts.fit is None:
        assert sorted(gate) == sorted(numbers) or len(gate) == most
        return
    fit = numbers_of(parts.fit)
    assert len(set(fit)) >= LEAST_TO_FIT
    assert not set(gate) & set(fit)
    assert sorted(gate + fit) == sorted(numbers) or len(gate) == most


@pytest.mark.parametrize(
    ("images", "most", "gate", "fit"),
    [
        *((99, 512, 99, 0), (100, 512, 50, 50), (360, 512, 180, 180), (1024, 512, 512, 512), (600, 512, 300, 300)),
        *((60, 8, 8, 52), (90, 64, 64, 0), (5000, 512, 512, 512)),
    ],
)
def test_half_of_the_images_go_to_the_fit_or_those_that_the_gate_does_not_need(
    images: int, most: int, gate: int, fit: int
) -> None:
    parts = divided(range(images), most)
    assert len(numbers_of(parts.gate)) == gate
    assert (0 if parts.fit is None else len(numbers_of(parts.fit))) == fit


def test_the_division_does_not_depend_on_the_order() -> None:
    order = np.random.default_rng(0).permutation(700).tolist()
    first, second = divided(range(700)), divided(order)
    assert set(numbers_of(first.gate)) == set(numbers_of(second.gate))
    assert set(numbers_of(first.fit)) == set(numbers_of(second.fit))


def test_few_images_are_named_with_the_least_number() -> None:
    assert "at least 100 different images" in str(divided([1, 2, 2, 3]).no_fit)
    assert "only 3 could be read" in str(divided([1, 2, 2, 3]).no_fit)


@pytest.mark.parametrize(("most", "enough"), [(7, False), (8, True)])
def test_a_gate_that_becomes_too_small_for_int8_is_refused_it(most: int, enough: bool) -> None:
    parts = with_fit_part(Parts(part(range(200)), part([1000]), part(range(2000, 2016)), 0, None), most)
    assert parts.gate.different == most
    assert (parts.too_few is None) is enough
    assert (len(parts.choose.images), len(parts.calibrate.images)) == ((1, 16) if enough else (0, 0))
    without_int8 = divided(range(200), most)
    assert without_int8.too_few is None


# --- images of none of the classes ---------------------------------------------------------------------


def test_negatives_that_are_images_of_the_data_are_left_out(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for seed in range(6):
        write_image(tmp_path / "all" / f"{seed}.png", seed)
    Image.new("RGB", (5, 5)).save(tmp_path / "all" / "0.bmp")
    (tmp_path / "all" / "odd.png").write_text("no picture")
    for seed in range(2):
        write_image(tmp_path / "own" / f"{seed}.png", seed)
    own = read_negatives(tmp_path / "own", divided([1]), TINY, lambda event: None)
    events: list[Event] = []
    empty = part([])
    found = read_negatives(tmp_path / "all", Parts(own, empty, empty, 0, None), TINY, events.append)
    assert (found.size.images, found.size.words()) == (5, "5 images given with --negatives")
    own_digests = {hashlib.sha256(image.tobytes()).digest() for image in own.images}
    assert not own_digests & {hashlib.sha256(image.tobytes()).digest() for image in found.images}
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any("odd.png" in text for text in notices)
    assert any("2 of 7 images are skipped" in text for text in notices)


@pytest.mark.parametrize("content", [None, "no picture"])
def test_a_folder_without_images_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "odd.png").write_text(content)
    with pytest.raises(DataError) as caught:
        read_negatives(tmp_path, divided([1]), TINY, lambda event: None)
    assert (caught.value.path, caught.value.remedy) == (tmp_path, "choose other images with --negatives")
