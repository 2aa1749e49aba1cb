"""Which files below a folder are images, and what is said of the others."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from comkd_cli.edge.image_files import READS_HEIF, SUFFIXES, is_image, is_junk, skipped_text, suffix_of, walk_images
from comkd_cli.edge.images import open_image

WriteImage = Callable[..., Path]


def test_pillow_reads_every_suffix_that_is_taken() -> None:
    known = Image.registered_extensions()
    assert all(known[suffix] in Image.OPEN for suffix in SUFFIXES)
    assert (".avif" in SUFFIXES) == bool("avif" in features.modules and features.check("avif"))
    assert (".heic" in SUFFIXES) == (".heif" in SUFFIXES) == READS_HEIF


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.JPG", ".jpg"), ("a.b.Png", ".png"), ("a", ""), ("a.", ""), (".jpg", ""), ("a.jpg.part", ".part"), ("", "")],
)
def test_a_suffix_is_what_follows_the_last_dot_of_a_name(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


@pytest.mark.parametrize("name", ["a.jpg", "A.JFIF", "b.c.TIF", "Thumbs.png", "a.jpe", "a.gif"])
def test_images_are_known_by_their_suffix_in_any_case(name: str) -> None:
    assert is_image(name)
    assert not is_junk(name)


JUNK = [
    "._a.jpg",
    ".a.png",
    "__MACOSX",
    "thumbs.db",
    "Thumbs.db",
    ".DS_Store",
    ".ipynb_checkpoints",
    "DESKTOP.INI",
    "@eaDir",
    "lost+found",
]


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_no_image(name: str) -> None:
    assert is_junk(name)
    assert not is_image(name)


def test_images_are_found_at_any_depth_in_a_fixed_order_and_others_are_counted(
    tmp_path: Path, write_image: WriteImage
) -> None:
    for name in ["b/x.png", "a.jpe", "b/a.JFIF", "c/d/e.gif", "c.webp"]:
        write_image(tmp_path / name, format="PNG")
    for name in ["__MACOSX/._b.png", ".ipynb_checkpoints/x-checkpoint.png", "b/._x.png"]:
        write_image(tmp_path / name, format="PNG")
    for name in ["notes.txt", "b/Thumbs.db", "b/list.TXT", "README", ".DS_Store"]:
        (tmp_path / name).write_bytes(b"")
    skipped: Counter[str] = Counter()
    found = [path.relative_to(tmp_path).as_posix() for path in walk_images(tmp_path, skipped)]
    assert found == ["a.jpe", "c.webp", "b/a.JFIF", "b/x.png", "c/d/e.gif"]
    assert skipped == {".txt": 2, "": 1}


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", os.fspath(tmp_path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError):
        list(walk_images(tmp_path))


def test_skipped_files_are_one_sentence_with_the_most_frequent_first() -> None:
    assert skipped_text({}) == ""
    assert skipped_text({".txt": 1}) == "1 file of another type is skipped: 1 .txt"
    assert skipped_text({".txt": 2, ".psd": 10}) == "12 files of other types are skipped: 10 .psd, 2 .txt"
    many = {f".{letter}": 1 for letter in "abcdefghij"} | {".z": 1000}
    assert skipped_text(many).endswith(
        "1,010 files of other types are skipped: 1,000 .z, 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, 1 .g, 3 of 3 other types"
    )


def test_skipped_heic_names_what_to_install() -> None:
    assert skipped_text({".txt": 2, ".heic": 10}) == (
        "12 files of other types are skipped: 10 .heic, 2 .txt; to read HEIC: pip install 'comkd[heic]'"
    )


def test_heic_shows_the_picture_that_was_saved(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    Image.new("RGB", (64, 48), (200, 30, 60)).save(tmp_path / "a.heic", quality=95)
    picture = open_image(tmp_path / "a.heic")
    assert picture.size == (64, 48)
    assert all(abs(found - saved) < 8 for found, saved in zip(picture.getpixel((32, 24)), (200, 30, 60), strict=True))


def test_without_pillow_heif_heic_is_a_file_of_another_type(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from comkd_cli.edge.image_files import SUFFIXES, is_image\n"
        "print(is_image('a.heic'), is_image('a.jpg'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
