from pathlib import Path

import pytest

from comkd_cli.data.label_file import LabelFile, read_label_file
from comkd_cli.errors import DataError

CLASSES = ("cat", "hot dog")


def write(folder: Path, text: str, name: str = "labels.csv") -> LabelFile:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return read_label_file(path)


def test_images_that_the_file_does_not_name_have_no_label(tmp_path: Path) -> None:
    file = write(tmp_path, "path,class\nb.png,hot dog\nsub/c.png,cat\n")
    labelling = file.labels(tmp_path, ("a.png", "b.png", "sub/c.png"), CLASSES, ())
    assert (labelling.labels, labelling.unused) == ((-1, 1, 0), 0)
    assert file.class_names == ["cat", "hot dog"]


def test_byte_order_marks_line_ends_quotes_spellings_and_other_columns_are_read(tmp_path: Path) -> None:
    lines = (
        "\ufeffConfidence, Class ,PATH",
        '0.9,Hot_Dog,"a, b.png"',
        "",
        '0.8,"cat","say ""hi"".png"',
        "1,hot dog,./x/../c.png",
    )
    file = write(tmp_path, "\r\n".join(lines))
    images = ("a, b.png", 'say "hi".png', "c.png", "d.png")
    assert file.labels(tmp_path, images, CLASSES, ()).labels == (1, 0, 1, -1)
    assert file.class_names == ["Hot Dog", "cat"]


def test_paths_count_from_the_folder_or_from_the_file(tmp_path: Path) -> None:
    images = ("train/a.png", "train/b.png", "train/c.png", "a.png")
    rows = f"path,class\ntrain/b.png,cat\nc.png,hot dog\n{tmp_path}/train/a.png,cat\n"
    assert write(tmp_path / "train", rows).labels(tmp_path, images, CLASSES, ()).labels == (0, 0, 1, -1)
    beside = write(tmp_path, f"path,class\n{tmp_path.name}/train/a.png,cat\n", f"../{tmp_path.name}.csv")
    assert beside.labels(tmp_path, images, CLASSES, ()).labels == (0, -1, -1, -1)
    with pytest.raises(DataError) as caught:
        write(tmp_path / "train", "path,class\na.png,cat\n").labels(tmp_path, images, CLASSES, ())
    assert (caught.value.field, caught.value.found) == ("line 2", "a.png, train/a.png")


def test_lines_for_images_that_are_scored_are_counted_and_give_no_label(tmp_path: Path) -> None:
    file = write(tmp_path, "path,class\ntrain/a.png,cat\ntest/b.png,unknown\n")
    labelling = file.labels(tmp_path, ("train/a.png",), CLASSES, ("test/b.png",))
    assert (labelling.labels, labelling.unused) == ((0,), 1)


@pytest.mark.parametrize(
    ("rows", "field", "found"),
    [
        ("gone.png,cat\n", "line 2", "gone.png"),
        ("a.png,cat\nb.png,wolf\n", "line 3", "wolf"),
        ("a.png,cat\nb.png,cat\n./a.png,hot dog\n", "line 4", "cat, hot dog"),
    ],
)
def test_what_the_images_contradict_is_named_with_its_line(tmp_path: Path, rows: str, field: str, found: str) -> None:
    file = write(tmp_path, f"path,class\n{rows}")
    with pytest.raises(DataError) as caught:
        file.labels(tmp_path, ("a.png", "b.png"), CLASSES, ())
    error = caught.value
    assert (error.path, error.field, error.found) == (file.path, field, found)
    assert error.remedy


def test_the_same_line_twice_is_one_label(tmp_path: Path) -> None:
    file = write(tmp_path, "path,class\na.png,hot_dog\na.png,Hot Dog\n")
    assert file.labels(tmp_path, ("a.png",), CLASSES, ()).labels == (1,)


@pytest.mark.parametrize(
    ("text", "field", "found"),
    [
        ("", "line 1", "nothing"),
        ("a.png,cat\n", "line 1", "a.png,cat"),
        ("path,class,class\na.png,cat,dog\n", "line 1", "path,class,class"),
        ("path,class\na.png\n", "line 2", "a.png"),
        ("path,class\na.png,cat\n,cat\n", "line 3", ",cat"),
        ("path,class\na,b.png,cat\n", "line 2", "a,b.png,cat"),
        ('"path\n', "line 1", "unexpected end of data"),
        ("path,class\na.png,\n", "line 2", "''"),
        ("path,class\na.png,cat\nb.png,ca\u200bt\n", "line 3", repr("ca\u200bt")),
        ('path,class\na.png,cat\n"b.png,cat\n', "line 3", "unexpected end of data"),
        ("path,class\n", None, None),
    ],
)
def test_what_is_no_list_of_labels_is_named_with_its_line(
    tmp_path: Path, text: str, field: str | None, found: str | None
) -> None:
    with pytest.raises(DataError) as caught:
        write(tmp_path, text)
    error = caught.value
    assert (error.path, error.field, error.found) == (tmp_path / "labels.csv", field, found)
    assert error.remedy


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,class\ncaf\xe9.png,cat\n")
    with pytest.raises(DataError, match="could not be read") as caught:
        read_label_file(tmp_path / "labels.csv")
    assert caught.value.path == tmp_path / "labels.csv"
