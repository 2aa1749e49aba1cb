import os
import pickle
from dataclasses import replace

import pytest
from PIL import Image

from comkd_cli.data.source import ImageSet, Source, sampled_content


def open_grey(key: str) -> Image.Image:
    return Image.new("RGB", (2, 2), (int(key), 0, 0))


IMAGES = ImageSet(("3", "1", "2"), (0, 1, 0), open_grey, (30, 10, 20))
SOURCE = Source("set", ("cat", "dog"), "a photo of a {}.", IMAGES, None)


def test_images_are_opened_by_their_position() -> None:
    assert [IMAGES.open(i).getpixel((0, 0)) for i in range(len(IMAGES))] == [(3, 0, 0), (1, 0, 0), (2, 0, 0)]


def test_a_subset_keeps_keys_labels_and_sizes_together_in_the_order_asked_for() -> None:
    chosen = IMAGES.subset([2, 0])
    assert (chosen.keys, chosen.labels, chosen.sizes_bytes) == (("2", "3"), (0, 0), (20, 30))
    assert chosen.open(0).getpixel((0, 0)) == (2, 0, 0)
    unlabelled = ImageSet(("1", "2"), None, open_grey).subset([1])
    assert (unlabelled.labels, unlabelled.sizes_bytes) == (None, ())


def test_prompts_name_each_class_in_order() -> None:
    assert SOURCE.prompts == ["a photo of a cat.", "a photo of a dog."]


@pytest.mark.parametrize(
    "other",
    [
        replace(SOURCE, class_names=("dog", "cat")),
        replace(SOURCE, class_names=("cat", "cow")),
        replace(SOURCE, template="a {}."),
        replace(SOURCE, train=replace(IMAGES, keys=("3", "1", "4"))),
        replace(SOURCE, train=replace(IMAGES, labels=(0, 1, 1))),
        replace(SOURCE, train=replace(IMAGES, labels=None)),
        replace(SOURCE, train=replace(IMAGES, sizes_bytes=(30, 10, 21))),
        replace(SOURCE, train=IMAGES.subset([0, 1])),
        replace(SOURCE, train=IMAGES.subset([1, 0, 2])),
    ],
)
def test_the_fingerprint_changes_with_anything_that_training_sees(other: Source) -> None:
    assert other.fingerprint() != SOURCE.fingerprint()


def test_the_fingerprint_does_not_change_with_what_training_never_sees() -> None:
    assert replace(SOURCE, test=IMAGES, name="other").fingerprint() == SOURCE.fingerprint()


def test_the_fingerprint_is_what_it_was_before_there_were_shards() -> None:
    # Written down then: runs that were made with it must still be known as finished.
    assert SOURCE.fingerprint() == "9b9eff3baa1ea9393407e92336ab5774988bcb5aa5eebbcafa61a535c7fb1aa9"
    assert sampled_content(IMAGES) == "c12d88f188a3a406644393ddfe7efc653c1e199cbcc0195426b81c7ec64c77bc"


def test_a_file_name_that_is_not_utf8_has_a_fingerprint_too() -> None:
    odd = [os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png")]
    first, second = (replace(SOURCE, train=replace(IMAGES, keys=("3", "1", name))).fingerprint() for name in odd)
    assert first != second


def test_an_image_set_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(IMAGES)) == IMAGES
