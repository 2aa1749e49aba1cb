"""Which images are held out: by content, stable where images are added, and on both sides of every class."""

import hashlib
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.data.holdout import Holdout, name_and_size_digest, stratified

DIGESTS = st.binary(min_size=32, max_size=32)
PERCENTAGES = st.floats(0.1, 99.0)


def held_of(holdout: Holdout, digests: list[bytes]) -> set[bytes]:
    return {digest for digest in digests if holdout.holds_out(digest)}


@given(st.lists(DIGESTS), st.lists(DIGESTS), PERCENTAGES)
def test_images_that_are_added_move_none_without_labels(before: list[bytes], added: list[bytes], share: float) -> None:
    first = stratified(share, "contents", before, None)
    second = stratified(share, "contents", [*added, *before], None)
    assert held_of(first, before) == held_of(second, before)


@given(st.lists(st.tuples(DIGESTS, st.integers(0, 3)), unique_by=lambda pair: pair[0]), st.data(), PERCENTAGES)
def test_images_that_are_added_move_at_most_one_image_of_a_class(
    images: list[tuple[bytes, int]], data: st.DataObject, share: float
) -> None:
    count = data.draw(st.integers(0, len(images)))
    before = images[:count]
    first = stratified(share, "contents", *_columns(before))
    second = stratified(share, "contents", *_columns(images))
    moved: dict[int, int] = defaultdict(int)
    for digest, label in before:
        moved[label] += first.holds_out(digest) != second.holds_out(digest)
    assert all(times <= 1 for times in moved.values())


@given(st.lists(st.tuples(DIGESTS, st.integers(0, 3)), unique_by=lambda pair: pair[0]), PERCENTAGES)
def test_every_class_of_two_distinct_images_is_on_both_sides(images: list[tuple[bytes, int]], share: float) -> None:
    holdout = stratified(share, "contents", *_columns(images))
    classes: dict[int, list[bool]] = defaultdict(list)
    for digest, label in images:
        classes[label].append(holdout.holds_out(digest))
    for sides in classes.values():
        assert set(sides) == ({False} if len(sides) == 1 else {False, True})


@given(st.lists(st.tuples(DIGESTS, st.integers(0, 3)), min_size=1), PERCENTAGES)
def test_the_saved_rule_decides_as_the_one_that_was_made(images: list[tuple[bytes, int]], share: float) -> None:
    digests, labels = _columns([*images, *images])  # each image twice
    holdout = stratified(share, "contents", digests, labels)
    again = Holdout(holdout.percent, holdout.fingerprint, dict(holdout.exceptions))
    assert [again.holds_out(digest) for digest in digests] == [holdout.holds_out(digest[:16]) for digest in digests]


@pytest.mark.parametrize("share", [1.0, 10.0, 50.0, 90.0])
def test_the_share_is_that_of_the_digests(share: float) -> None:
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(20_000)]
    found = 100 * sum(map(Holdout(share).holds_out, digests)) / len(digests)
    # Four standard deviations of a binomial share.
    assert abs(found - share) < 4 * 100 * (share / 100 * (1 - share / 100) / len(digests)) ** 0.5


def test_an_array_of_digests_is_decided_as_each_digest() -> None:
    digests = np.random.default_rng(5).integers(0, 256, (500, 16), dtype=np.uint8)
    rule = Holdout(30.0)
    assert rule.held_out(digests).tolist() == [rule.holds_out(row.tobytes()) for row in digests]


def test_names_and_sizes_are_compared_without_folders() -> None:
    assert name_and_size_digest("cat/1.png", 7) == name_and_size_digest("elsewhere/dog/1.png", 7)
    assert (
        len({name_and_size_digest("1.png", 7), name_and_size_digest("1.png", 8), name_and_size_digest("2.png", 7)}) == 3
    )


def _columns(images: list[tuple[bytes, int]]) -> tuple[list[bytes], list[int]]:
    return [digest for digest, _ in images], [label for _, label in images]
