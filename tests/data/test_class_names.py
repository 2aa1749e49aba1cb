from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.data.class_names import class_key, clean_class_names, missing_text, read_class_names
from comkd_cli.edge.class_names import clean_class_name
from comkd_cli.errors import DataError

BREAKS = ("\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [
        ("red_panda", "red panda"),
        ("  red__panda\t", "red panda"),
        ("_fox_", "fox"),
        ("fox\u00a0cub\u3000", "fox cub"),
        ("cafe\u0301", "caf\u00e9"),
        ("_\nfox", "fox"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),  # the joiner is spelling
        *((f"fox{end}", "fox") for end in BREAKS),
        *((f"{start}fox", "fox") for start in BREAKS),
    ],
)
def test_a_name_is_one_line_with_single_spaces(given_name: str, expected: str) -> None:
    assert clean_class_name(given_name) == expected


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("", "is empty"),
        (" \u2003_", "is empty"),
        ("\u200d", "is empty"),
        ("a\x00b", "the invisible character U+0000"),
        ("\x1b[31mfox", "the invisible character U+001B"),
        ("fox\u200b", "the invisible character U+200B"),
        ("\ufefffox", "the invisible character U+FEFF"),
        ("fox\u202e", "the invisible character U+202E"),
        ("fox\udcff", "is not UTF-8"),
        *((f"two{end}lines", "has a line break within it") for end in BREAKS),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_the_file_and_its_place(odd: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        clean_class_names(["cat", odd, "dog"], "data.classes")
    assert (caught.value.field, caught.value.found) == ("data.classes: class 2", repr(odd))
    assert reason in caught.value.problem


@pytest.mark.slow
@given(st.lists(st.text(max_size=5), min_size=2, unique_by=class_key))
def test_an_accepted_class_list_survives_a_text_file_with_a_name_a_line(class_names: list[str]) -> None:
    try:
        cleaned = clean_class_names(class_names, "list")
    except DataError:
        return
    content = "".join(f"{name}\n" for name in cleaned)
    assert content.encode().decode().splitlines() == content.split("\n")[:-1] == cleaned
    assert clean_class_names(cleaned, "list") == cleaned
    assert [class_key(name) for name in cleaned] == [class_key(name) for name in class_names]


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]), min_size=1))
def test_visible_names_are_accepted(name: str) -> None:
    if name.strip("_"):
        assert clean_class_name(name)


@pytest.mark.parametrize("content", [b"cat\nhot dog\n", b"cat\r\nhot_dog", b"\xef\xbb\xbf cat \n\n\nhot dog\t\n\n"])
def test_a_class_list_is_a_name_a_line_whoever_wrote_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    assert read_class_names(tmp_path / "names.txt") == ["cat", "hot dog"]


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        (
            b"cat\ndog\nCat\ncow\nDOG\n",
            None,
            "repeats class names: 'cat' at 1 and 3; 'dog' at 2 and 5; list",
        ),
        (b"red_panda\n\nred panda\n", None, "repeats class names: 'red panda' at 1 and 3"),
        (b"cat\n", None, "too few classes: 1 (allowed: at least 2)"),
        (b"\n\n", None, "too few classes: 0 (allowed: at least 2)"),
        (b"caf\xe9\ndog\n", None, "the class list could not be read"),
        ("cat\n\nfox\u2028dog\n".encode(), "line 3", "has a line break within it: 'fox\\u2028dog'; use a name"),
        (b"cat\nfo\x00x\n", "line 2", "contains the invisible character U+0000"),
        (b"# classes\ncat\ndog\n", "line 1", "looks like a comment"),
        (b"cat\n\n  #dog\n", "line 3", "looks like a comment"),
    ],
)
def test_a_class_list_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, content: bytes, field: str | None, message: str
) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_class_names(path)
    assert (caught.value.path, caught.value.field) == (path, field)
    assert message in str(caught.value)


def test_a_name_may_have_a_number_sign_where_no_comment_can_be_meant(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("c sharp #\nf#\n")
    assert read_class_names(tmp_path / "names.txt") == ["c sharp #", "f#"]
    assert clean_class_names(["#1", "#2"], "data.classes") == ["#1", "#2"]


def test_a_class_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_class_names(tmp_path / "names.txt")
    assert caught.value.path == tmp_path / "names.txt"


def test_classes_without_images_are_named_for_each_split_that_has_labels() -> None:
    names = ["cat", "dog", "fox"]
    assert missing_text(names, {"training": [0, 1, 2], "validation": None, "test": [2, 1, 0]}) == ""
    assert missing_text(names, {"training": [2, 2], "test": []}) == "no training images of: cat, dog"
    assert missing_text(names, {"training": [0, 2], "test": [0, 1]}) == (
        "no training images of: dog; no test images of: fox (the mean per class is over 2 of 3)"
    )
    many = [str(n) for n in range(9)]
    assert missing_text(many, {"training": [0]}) == "no training images of: 1, 2, 3, 4, 5 and 3 more"


def test_a_name_of_ten_thousand_characters_is_refused_and_shown_shortened() -> None:
    assert clean_class_name("x" * 1000) == "x" * 1000
    with pytest.raises(DataError, match="has 10,000 characters, more than 1,000") as caught:
        clean_class_names(["fox", "x" * 10_000], "data.classes")
    assert caught.value.field == "data.classes: class 2"
    assert len(str(caught.value)) < 400
