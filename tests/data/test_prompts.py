from pathlib import Path

import open_clip
import pytest

from comkd_cli.data.prompts import Prompts, as_prompts, openai_templates, read_prompts
from comkd_cli.errors import DataError, RecipeError

NAMES = ("cat", "red panda")


def test_a_description_replaces_the_templates_of_its_class_alone() -> None:
    prompts = Prompts(("a {}.", "the {}"), {"cat": ("a small feline",)})
    assert prompts.of("cat") == ("a small feline",)
    assert prompts.of("dog") == ("a dog.", "the dog")
    assert not prompts.are_single(("cat", "dog"))
    assert prompts.are_single(("cat",))
    first = Prompts(("a {}.", "the {}"), {"cat": ("one", "two")}).first()
    assert (first.of("cat"), first.of("dog")) == (("one",), ("a dog.",))
    assert as_prompts("a {}.") == Prompts(("a {}.",))
    assert as_prompts(prompts) is prompts


def test_the_templates_of_openai_are_those_of_open_clip() -> None:
    assert openai_templates() == tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert len(set(openai_templates())) == 80


def test_descriptions_are_read_by_any_spelling_of_a_class(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("\ufeffRed_Panda: >\n  a red panda\n  in a tree\ncat: [a cat, 'a  feline']\n", encoding="utf-8")
    assert read_prompts(path, NAMES) == {"red panda": ("a red panda in a tree",), "cat": ("a cat", "a feline")}


@pytest.mark.parametrize(
    ("text", "field", "found"),
    [
        ("dog: a dog\ncat: a cat", None, "dog"),
        ("cat: a cat\nCAT: the cat", "CAT", None),
        ("cat: []", "cat", "[]"),
        ("cat: 3", "cat", "3"),
        ("cat: [a cat, ' ']", "cat", "['a cat', ' ']"),
        ("- cat", None, None),
        ("", None, None),
    ],
)
def test_descriptions_that_cannot_be_used_are_refused(
    tmp_path: Path, text: str, field: str | None, found: str | None
) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_prompts(path, NAMES)
    assert (caught.value.path, caught.value.field, caught.value.found) == (path, field, found)


def test_a_file_that_is_not_yaml_or_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("cat: [")
    with pytest.raises(RecipeError) as caught:
        read_prompts(path, NAMES)
    assert caught.value.path == str(path)
    path.write_bytes(b"cat: caf\xe9")
    with pytest.raises(DataError) as refused:
        read_prompts(path, NAMES)
    assert refused.value.path == path
