import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comkd_cli.data import shard_index, shard_indexing
from comkd_cli.data.contents import Fingerprint
from comkd_cli.data.shard_indexing import open_index
from comkd_cli.data.shard_members import SkippedFiles, read_members
from comkd_cli.data.shards import (
    shard_images,
)
from comkd_cli.edge.images import UnreadableImage, open_image
from comkd_cli.errors import DataError, WriteError
from comkd_cli.events import Event, Progress
from tests import warm
from tests.tars import encoded, opened, samples, silent, write, write_members


def test_a_link_counts_by_its_own_name(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"blob{number}", *samples(1))
        (tmp_path / f"{number}.tar").symlink_to(tmp_path / f"blob{number}")
    images = opened(tmp_path / "0.tar", tmp_path / "1.tar", home=tmp_path / "home")
    assert list(images.keys) == ["0/000000000", "1/000000000"]


def test_what_is_sent_to_another_process_is_a_path(three: list[Path], tmp_path: Path) -> None:
    images = opened(*three, home=tmp_path / "home")
    sent = pickle.dumps(images)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert list(again.keys) == list(images.keys)
    assert again.open(9).tobytes() == images.open(9).tobytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_reads_beside_its_parent(three: list[Path], tmp_path: Path) -> None:
    images = opened(*three, home=tmp_path / "home")
    expected = [images.open(i).tobytes() for i in range(10)]
    child = os.fork()
    if not child:
        good = all(images.open(i % 10).tobytes() == expected[i % 10] for i in range(500))
        os._exit(0 if good else 1)
    assert all(images.open(i % 10).tobytes() == expected[i % 10] for i in range(500))
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "OPEN_SHARDS", 2)
    paths = [write(tmp_path / f"{n}.tar", *samples(1, n)) for n in range(5)]
    images = opened(*paths, home=tmp_path / "home")
    for position in (0, 1, 2, 3, 4, 0, 4, 3):
        assert images.open(position).tobytes() == open_image(io.BytesIO(encoded(position))).tobytes()
    assert len(images.index._files._files) == 2


def test_bytes_that_are_no_image_are_told_with_shard_and_key_alike_every_time(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", {"__key__": "good", "png": encoded(0)}, {"__key__": "bad", "png": b"no image"})
    images = opened(path, home=tmp_path / "home")
    told = set()
    for _ in range(2):
        with pytest.raises(UnreadableImage) as caught:
            images.open(1)
        told.add(str(caught.value))
    assert len(told) == 1
    assert told.pop().startswith(f"{path}: bad: ")


def test_a_shard_that_is_gone_or_cut_since_is_told_by_each_of_its_images(three: list[Path], tmp_path: Path) -> None:
    images = opened(*three, home=tmp_path / "home")
    three[1].unlink()
    with pytest.raises(UnreadableImage, match=r"train-1\.tar: 000000004: No such file"):
        images.open(4)
    three[0].write_bytes(three[0].read_bytes()[:600])
    with pytest.raises(UnreadableImage, match=r"train-0\.tar: 000000003: the shard ends"):
        images.open(3)


def test_a_damaged_shard_is_one_error_that_names_it(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", *samples(3)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
        third = tar.getmember("000000002.png")
    damaged = {
        "empty": b"",
        "noise": b"\x07" * 5000,
        "header": whole[: third.offset + 100],
        "image": whole[: third.offset_data + 10],
        "last": whole[: last.offset_data + 1],
        "unclosed": whole[: last.offset_data + 512],
        "flipped": whole[: third.offset] + b"\xff" * 512 + whole[third.offset + 512 :],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        with pytest.raises(DataError, match="could not be read as a tar"):
            opened(path, home=tmp_path / "home")
        with pytest.raises(DataError) as caught:
            list(read_members(path))
        assert caught.value.path == path
        assert ("in or after the sample" in caught.value.problem) == (name not in ("empty", "noise"))


def test_thousands_of_headers_that_describe_the_next_are_one_error(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 4
    (tmp_path / "a.tar").write_bytes((member.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 2000)
    with pytest.raises(DataError, match="could not be read as a tar") as caught:
        list(read_members(tmp_path / "a.tar"))
    assert caught.value.path == tmp_path / "a.tar"


@pytest.mark.parametrize(("size", "offset"), [(2**62, 0), (-1, 0), (9, -5)])
def test_an_index_with_other_sizes_than_the_shards_reads_no_more_than_there_is(
    three: list[Path], tmp_path: Path, size: int, offset: int
) -> None:
    index = open_index(three, tmp_path / "home", silent)
    for name, value in (("sizes", size), ("offsets", offset)):
        numbers = np.fromfile(index.folder / f"{name}.bin", np.int64)
        numbers[0] = value
        numbers.tofile(index.folder / f"{name}.bin")
    with pytest.raises(UnreadableImage):
        open_index(three, tmp_path / "home", silent).open(0)


def test_shards_without_images_or_compressed_ones_are_told(tmp_path: Path) -> None:
    none = write(tmp_path / "none.tar", {"__key__": "a", "txt": "words"})
    with pytest.raises(DataError, match=r"none\.tar: contains no images; .*comkd reads .*KEY\.jpg"):
        opened(none, home=tmp_path / "home")
    nothing = write_members(tmp_path / "nothing.tar")
    with pytest.raises(DataError, match=r"nothing\.tar: contains no images"):
        opened(nothing, home=tmp_path / "home")
    packed = tmp_path / "packed.tar.gz"
    write(packed, *samples(1))
    with pytest.raises(DataError, match=r"is compressed \(gzip\)") as caught:
        opened(packed, home=tmp_path / "home")
    assert caught.value.path == packed


def test_a_key_that_comes_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    apart = write(tmp_path / "apart.tar", *samples(2), *samples(1))
    with pytest.raises(DataError) as caught:
        opened(apart, home=tmp_path / "home")
    assert (caught.value.path, caught.value.found) == (apart, "000000000")
    beside = write_members(tmp_path / "beside.tar", ("a.png", encoded(0)), ("a.png", encoded(1)))
    with pytest.raises(DataError) as caught:
        opened(beside, home=tmp_path / "home")
    assert (caught.value.path, caught.value.field) == (beside, "a.png")


def test_keys_that_come_again_in_another_shard_get_the_shards_name(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, *samples(3)) for name in ("00000.tar", "00001.tar"))
    images = opened(first, second, home=tmp_path / "home")
    assert list(images.keys) == [f"{shard}/{n:09d}" for shard in ("00000", "00001") for n in range(3)]
    assert sorted(images.rows.tolist()) == list(range(6))
    assert list(pickle.loads(pickle.dumps(images)).keys) == list(images.keys)
    alike = write(tmp_path / "elsewhere/00000.tar", *samples(3))
    with pytest.raises(DataError, match="have the same name and both contain the sample") as caught:
        opened(first, alike, home=tmp_path / "home")
    assert str(caught.value.found).startswith("00000/00000000")


def test_an_index_is_made_once_and_again_for_a_changed_shard(three: list[Path], tmp_path: Path) -> None:
    told: list[Event] = []
    home = tmp_path / "home"
    first = open_index(three, home, told.append)
    assert [(e.done, e.total, e.unit) for e in told if isinstance(e, Progress)] == [(n, 3, "shards") for n in range(3)]
    told.clear()
    assert open_index(three, home, told.append).folder == first.folder
    assert told == []
    write(three[1], *samples(2, 4, "new"))
    changed = open_index(three, home, told.append)
    assert changed.folder != first.folder
    assert (len(first), len(changed)) == (10, 11)
    assert changed.key(5) == "new000000005"
    assert sorted(path.name for path in home.iterdir()) == sorted([first.folder.name, changed.folder.name])


def test_a_killed_indexing_resumes_at_the_next_shard(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    members = shard_indexing.read_members

    def counted(path: Path, skipped: SkippedFiles) -> Iterator[tuple[str, int, int]]:
        read.append(path.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return members(path, skipped)

    monkeypatch.setattr(shard_indexing, "read_members", counted)
    with pytest.raises(KeyboardInterrupt):
        open_index(three, tmp_path / "home", silent)
    assert len(open_index(three, tmp_path / "home", silent)) == 10
    assert read == ["train-0.tar", "train-1.tar", "train-2.tar", "train-2.tar"]


def test_parts_that_another_process_has_done_with_are_made_again(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = shard_indexing._make_parts

    def half(paths: list[Path], parts: Path, report: Any, fingerprint: Fingerprint) -> None:
        make(paths, parts, report, fingerprint)
        (parts / "000001.npz").unlink()

    monkeypatch.setattr(shard_indexing, "_make_parts", half)
    assert len(open_index(three, tmp_path / "home", silent)) == 10


def test_processes_that_make_the_same_index_at_once_do_not_disturb_one_another(
    three: list[Path], tmp_path: Path
) -> None:
    # An executor, for a pool of multiprocessing would wait for ever for one that died.
    with ProcessPoolExecutor(3, warm.context()) as pool:
        found = [
            future.result() for future in [pool.submit(open_index, three, tmp_path / "home", silent) for _ in range(3)]
        ]
    assert {(index.digest, len(index)) for index in found} == {(open_index(three, tmp_path, silent).digest, 10)}
    assert [path.name for path in (tmp_path / "home").iterdir()] == [found[0].folder.name]


@pytest.mark.parametrize("shard", [0, 2])
def test_parts_that_another_process_removes_while_they_are_written_do_no_harm(
    shard: int, three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests_of = shard_indexing._content_digests
    finished = []

    def overtaken(path: Path, *arguments: Any) -> Iterator[bytes]:
        if path == three[shard] and not finished:
            finished.append("another process")
            finished.append(open_index(three, tmp_path / "home", silent).digest)
        return digests_of(path, *arguments)

    monkeypatch.setattr(shard_indexing, "_content_digests", overtaken)
    index = open_index(three, tmp_path / "home", silent)
    assert finished == ["another process", index.digest]
    assert [path.name for path in (tmp_path / "home").iterdir()] == [index.folder.name]


def test_an_index_that_cannot_be_written_is_refused(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(
        WriteError, match=r"could not be written: .*; a part of the path is a file; choose another path"
    ):
        open_index(three, tmp_path / "home", silent)


def test_a_damaged_index_is_made_again(three: list[Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    whole = open_index(three, home, silent)
    expected, digest = list(shard_images(whole).keys), whole.digest
    about = json.loads((whole.folder / "index.json").read_text())
    starts = [json.dumps({**about, "starts": value}).encode() for value in ([0, 10], [5, 5, 5, 10], [0, 9, 3, 10], [])]
    documents = (b"{", b'{"format": "other"}', b"[" * 5000, *starts)
    for name, content in (("offsets.bin", b"x"), *(("index.json", document) for document in documents)):
        (whole.folder / name).write_bytes(content)
        again = open_index(three, home, silent)
        assert (list(shard_images(again).keys), again.digest) == (expected, digest)


def test_processes_side_by_side_make_the_same_index(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = open_index(three, tmp_path / "alone", silent)
    monkeypatch.setattr(shard_indexing, "SHARDS_PER_PROCESS", 1)
    monkeypatch.setattr(shard_indexing.ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(shard_indexing, "get_context", {"spawn": warm.context()}.__getitem__)
    together = open_index(three, tmp_path / "together", silent)
    names = sorted(path.name for path in alone.folder.iterdir())
    assert names == sorted(path.name for path in together.folder.iterdir())
    assert all((alone.folder / name).read_bytes() == (together.folder / name).read_bytes() for name in names)
    three[1].write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"train-1\.tar: could not be read as a tar"):
        open_index(three, tmp_path / "together", silent)


def test_the_index_does_not_depend_on_how_much_is_held_in_memory(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_index(three, tmp_path / "whole", silent)
    monkeypatch.setattr(shard_index, "BLOCK_IMAGES", 2)
    pieces = open_index(three, tmp_path / "pieces", silent)
    assert (pieces.digest, pieces.rows.tolist()) == (whole.digest, whole.rows.tolist())
    assert pieces.spaced(3) == whole.spaced(3)


def test_keys_whose_hashes_agree_are_told_apart_by_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_indexing, "hashes_of", lambda keys: np.array([len(key) for key in keys], dtype="<u8"))
    content = [{"__key__": key, "png": encoded(n)} for n, key in enumerate(("b", "cc", "a", "dd", "c", "eee"))]
    one = opened(write(tmp_path / "one.tar", *content), home=tmp_path / "home")
    assert one.rows.tolist() == [1, 3, 0, 4, 2, 5]
    other = opened(write(tmp_path / "other.tar", *content[::-1]), home=tmp_path / "home")
    assert other.rows.tolist() == one.rows.tolist()[::-1]
    assert other.digest == one.digest
    assert other.ordered_digest != one.ordered_digest
    repeated = write(tmp_path / "repeated.tar", *content[:3], content[0])
    with pytest.raises(DataError, match="contains a sample twice") as caught:
        opened(repeated, home=tmp_path / "home")
    assert caught.value.found == "b"


def test_members_that_are_no_images_are_counted_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoded(1)
    paths = [
        write_members(
            tmp_path / "x-0.tar",
            ("a.jpg", picture),
            ("a.txt", b"a caption"),
            ("a.json", b"{}"),
            ("b.psd", picture),
            ("b.txt", b"a caption"),
            ("2024.05.01.jpg", picture),
            ("2024.05.01.txt", b"a caption"),
            ("c.mask.PNG", picture),
            ("c.png", picture),
            ("c.jpg", picture),
            ("noext", b"x"),
        ),
        write_members(
            tmp_path / "x-1.tar",
            ("d.gif", picture),
            ("e.PSD", picture),
            ("__MACOSX/d.jpg", picture),
            ("s/.hidden/d.jpg", picture),
            ("Thumbs.db", b"x"),
        ),
    ]
    with tarfile.open(paths[1], "a") as tar:
        link = tarfile.TarInfo("f.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "d.gif"
        tar.addfile(link)
    index = open_index(paths, tmp_path / "home", silent)
    assert [index.key(i) for i in range(len(index))] == ["a", "c", "d"]
    expected = SkippedFiles({".psd": 2, ".txt": 1, "": 1, ".jpg (no regular file)": 1}, 2, "2024.05.01.jpg", 1)
    assert index.skipped == expected
    monkeypatch.setattr(shard_indexing, "read_members", None)  # told again from what the index remembers
    again = open_index(paths, tmp_path / "home", silent)
    assert again.skipped == expected
    assert again.skipped.texts() == [
        "in samples without an image, 5 members of other types are skipped: 2 .psd, 1 .jpg (no regular file), 1 .txt, "
        "1 without a suffix",
        "2 images such as 2024.05.01.jpg are skipped: a key ends at the first dot of a name, so they are fields of a "
        "sample; rename them to use them as images",
        "1 images are skipped: only the first image of a sample is used",
    ]


def test_a_shard_whose_pictures_all_have_two_dots_says_why_it_holds_no_images(tmp_path: Path) -> None:
    path = write_members(tmp_path / "x.tar", ("a.b.jpg", encoded(0)))
    with pytest.raises(DataError, match=r"contains no images.*such as a\.b\.jpg are skipped: a key ends at the first"):
        opened(path, home=tmp_path / "home")


def test_other_readable_types_make_another_index(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_index(three, tmp_path / "home", silent)
    monkeypatch.setattr(shard_indexing, "SUFFIXES", shard_indexing.SUFFIXES | {".psd"})
    assert open_index(three, tmp_path / "home", silent).folder != first.folder
