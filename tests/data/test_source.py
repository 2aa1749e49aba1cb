import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from PIL import Image

from comkd_cli.data.prompts import Prompts
from comkd_cli.data.source import ImageSet, Source


def open_grey(key: str) -> Image.Image:
    return Image.new("RGB", (2, 2), (int(key), 0, 0))


IMAGES = ImageSet(("3", "1", "2"), (0, 1, 0), open_grey)
SOURCE = Source("set", ("cat", "dog"), "a photo of a {}.", IMAGES, None)


def test_images_are_opened_by_their_position() -> None:
    assert [IMAGES.open(i).getpixel((0, 0)) for i in range(len(IMAGES))] == [(3, 0, 0), (1, 0, 0), (2, 0, 0)]


def test_a_subset_keeps_keys_and_labels_together_in_the_requested_order() -> None:
    chosen = IMAGES.subset([2, 0])
    assert (chosen.keys, chosen.labels) == (("2", "3"), (0, 0))
    assert chosen.open(0).getpixel((0, 0)) == (2, 0, 0)
    assert ImageSet(("1", "2"), None, open_grey).subset([1]).labels is None


def test_prompts_name_each_class_in_order() -> None:
    assert SOURCE.prompts == ["a photo of a cat.", "a photo of a dog."]
    several = replace(SOURCE, ensemble=Prompts(("a {}.", "the {}."), {"dog": ("a hound", "a puppy")}))
    assert several.prompts == ["a cat.", "a hound"]


def test_only_prompts_that_a_recipe_sets_are_parts_of_the_identity() -> None:
    assert set(SOURCE.identity()) == {"class_names", "template", "training_images", "training_labels"}
    several = replace(SOURCE, ensemble=Prompts((SOURCE.template, "a {}."), {"dog": ("a hound",)})).identity()
    assert (several["templates"], several["descriptions"]) == ([SOURCE.template, "a {}."], {"dog": ["a hound"]})


@pytest.mark.parametrize(
    "other",
    [
        replace(SOURCE, class_names=("dog", "cat")),
        replace(SOURCE, class_names=("cat", "cow")),
        replace(SOURCE, template="a {}."),
        replace(SOURCE, ensemble=Prompts((SOURCE.template, "a {}."))),
        replace(SOURCE, ensemble=Prompts((SOURCE.template,), {"cat": ("a feline",)})),
        replace(SOURCE, train=replace(IMAGES, keys=("3", "1", "4"))),
        replace(SOURCE, train=replace(IMAGES, labels=(0, 1, 1))),
        replace(SOURCE, train=replace(IMAGES, labels=None)),
        replace(
            SOURCE, train=replace(IMAGES, open_key=lambda key: Image.new("RGB", (2, 2), (int(key), key == "2", 0)))
        ),
        replace(SOURCE, train=IMAGES.subset([0, 1])),
        replace(SOURCE, train=IMAGES.subset([1, 0, 2])),
    ],
)
def test_the_identity_changes_with_anything_that_training_sees(other: Source) -> None:
    assert other.identity() != SOURCE.identity()


def test_the_identity_does_not_change_with_what_training_never_sees() -> None:
    assert replace(SOURCE, test=IMAGES, name="other").identity() == SOURCE.identity()


def test_file_names_that_are_not_utf8_have_a_digest_too() -> None:
    odd = [os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png")]
    first, second = (
        replace(IMAGES, keys=("3", "1", name), open_key=lambda key: Image.new("RGB", (2, 2))).digest for name in odd
    )
    assert first != second


def test_names_and_contents_cannot_be_mistaken_for_one_another() -> None:
    class Fixed:
        def __init__(self, *digests: bytes) -> None:
            self.all = digests

        def digests(self, keys: Sequence[str]) -> Iterator[bytes]:
            return iter(self.all)

    one = replace(IMAGES, keys=("a", "bc"), labels=None, contents=Fixed(b"x" * 32, b"y" * 32))
    other = replace(IMAGES, keys=("a" + "x" * 32, "c"), labels=None, contents=Fixed(b"b" * 32, b"y" * 32))
    assert one.digest != other.digest


def test_an_image_set_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(IMAGES)) == IMAGES
