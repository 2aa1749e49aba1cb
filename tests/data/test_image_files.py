import pytest
from PIL import Image, features

from comkd_cli.data.image_files import SUFFIXES, below_junk, is_image, is_junk, skipped_text, suffix_of


def test_pillow_reads_every_suffix_that_is_taken() -> None:
    known = Image.registered_extensions()
    assert all(known[suffix] in Image.OPEN for suffix in SUFFIXES)
    assert (".avif" in SUFFIXES) == bool("avif" in features.modules and features.check("avif"))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.JPG", ".jpg"), ("a.b.Png", ".png"), ("a", ""), ("a.", ""), (".jpg", ""), ("a.jpg.part", ".part"), ("", "")],
)
def test_a_suffix_is_what_follows_the_last_dot_of_a_name(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


@pytest.mark.parametrize("name", ["a.jpg", "A.JFIF", "b.c.TIF", "Thumbs.png"])
def test_images_are_known_by_their_suffix_in_any_case(name: str) -> None:
    assert is_image(name)
    assert not is_junk(name)


@pytest.mark.parametrize("name", ["._a.jpg", ".a.png", "__MACOSX", "thumbs.db", "DESKTOP.INI", "@eaDir", "lost+found"])
def test_junk_is_no_image(name: str) -> None:
    assert is_junk(name)
    assert not is_image(name)


def test_a_path_in_an_archive_is_junk_where_any_part_is() -> None:
    assert below_junk("a/__MACOSX/b.jpg")
    assert below_junk("./.git/b.jpg")
    assert not below_junk("./a/../b.jpg")


def test_skipped_files_are_one_sentence_with_the_most_frequent_first() -> None:
    assert skipped_text({}) == ""
    assert skipped_text({".txt": 1}) == "1 file of another type is skipped: 1 .txt"
    assert skipped_text({".txt": 2, ".heic": 10}) == "12 files of other types are skipped: 10 .heic, 2 .txt"
    many = {f".{letter}": 1 for letter in "abcdefghij"} | {".z": 1000}
    assert skipped_text(many).endswith(
        "1,010 files of other types are skipped: 1,000 .z, 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, 1 .g, 3 of 3 other types"
    )
