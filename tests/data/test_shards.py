import functools
import http.server
import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comkd_cli.data.shard_members import read_members
from comkd_cli.data.shards import ShardStore, source_name
from comkd_cli.edge.images import open_image
from comkd_cli.errors import DataError
from comkd_cli.events import Event, Notice
from tests.serving import serving
from tests.tars import encoded, opened, read_by_webdataset, samples, silent, write, write_members


def test_images_and_keys_are_those_that_webdataset_reads(three: list[Path], tmp_path: Path) -> None:
    images = opened(*three, home=tmp_path / "home")
    reference = read_by_webdataset(*three)
    assert len(images) == len(reference) == 10
    assert list(images.keys) == [sample["__key__"] for sample in reference]
    for position, sample in enumerate(reference):
        assert images.open(position).tobytes() == open_image(io.BytesIO(sample["png"])).tobytes()


def test_odd_names_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    picture = encoded(1)
    path = write_members(
        tmp_path / "odd.tar",
        ("__meta__", b"of the whole"),
        ("__skipped__/x.png", picture),
        ("./a.PNG", picture),
        ("./._a.PNG", b"of a Mac"),
        ("folder.d/b.png", picture),
        ("folder.d/b.jpg", encoded(2, "JPEG")),
        ("folder.d/c.txt", b"no picture"),
        ("c.mask.png", picture),
        ("no extension", b""),
        ("é" * 120 + ".webp", encoded(3, "WEBP")),
    )
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("odd\udcff.png"), io.BytesIO())
    reference = read_by_webdataset(path)
    images = {"png", "jpg", "webp"}
    expected = [sample["__key__"] for sample in reference if images & sample.keys()]
    assert [key for key, _, _ in read_members(path)] == expected
    found = opened(path, home=tmp_path / "home")
    assert list(found.keys) == expected == ["./a", "folder.d/b", "é" * 120, "odd\udcff"]
    assert found.open(1).tobytes() == open_image(io.BytesIO(picture)).tobytes()  # the first of the two


def test_keys_are_a_sequence_as_a_tuple_is(three: list[Path], tmp_path: Path) -> None:
    keys = opened(*three, home=tmp_path / "home").keys
    whole = tuple(keys)
    assert (keys[-1], keys[2:7:2], keys[np.int64(3)]) == (whole[-1], whole[2:7:2], whole[3])
    assert "000000003" in keys
    with pytest.raises(IndexError):
        keys[10]


def test_a_subset_is_an_ordinary_set(three: list[Path], tmp_path: Path) -> None:
    images = opened(*three, home=tmp_path / "home")
    chosen = images.subset([7, 0])
    assert chosen.keys == ("000000007", "000000000")
    assert chosen.open(0).tobytes() == images.open(7).tobytes()
    assert (chosen.rows, chosen.runs_on_disk) == (None, None)
    again = pickle.loads(pickle.dumps(chosen))
    assert again.open(1).tobytes() == images.open(0).tobytes()


def test_what_a_set_is_does_not_depend_on_which_shard_holds_what(three: list[Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    images = opened(*three, home=home)
    mixed = [samples(10)[n] for n in (3, 9, 1, 4, 7, 0, 2, 8, 6, 5)]
    packed = opened(write(tmp_path / "p/0.tar", *mixed[:7]), write(tmp_path / "p/1.tar", *mixed[7:]), home=home)
    assert packed.digest == images.digest
    assert packed.ordered_digest != images.ordered_digest  # what is kept by position must not be shared
    row_of = dict(zip(images.keys, images.rows.tolist(), strict=True))
    assert [row_of[key] for key in packed.keys] == packed.rows.tolist()
    assert sorted(row_of.values()) == list(range(10))
    without = opened(write(tmp_path / "q.tar", *mixed[:9]), home=home)
    other = bytes([mixed[0]["png"][-1] ^ 1])  # the last byte alone: name and size stay
    changed = opened(
        write(tmp_path / "r.tar", {**mixed[0], "png": mixed[0]["png"][:-1] + other}, *mixed[1:]), home=home
    )
    renamed = opened(write(tmp_path / "s.tar", *samples(10, prefix="x")), home=home)
    assert len({each.digest for each in (images, without, changed, renamed)}) == 4


def found(pattern: str, root: Path, fetch: bool = False) -> list[Path]:
    return ShardStore(root, root, silent, fetch).find(pattern)


def test_braces_stand_for_many_here_or_below_the_data_root(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found("set/train-{0..2}.tar", tmp_path) == three
    assert found(f"{tmp_path}/set/train-{{2,0}}.tar", tmp_path / "no") == [three[2], three[0]]
    assert found(f"file:{three[0]}::{three[2]}", tmp_path) == [three[0], three[2]]
    monkeypatch.chdir(three[0].parent)
    assert found("train-{0..2}.tar", tmp_path) == [Path(f"train-{n}.tar") for n in range(3)]


def test_missing_shards_are_one_error_with_the_first_of_them(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        found("set/train-{0..9}.tar", tmp_path)
    assert (caught.value.field, caught.value.found) == ("data.shards", tmp_path / "set/train-3.tar")
    assert caught.value.problem == "set/train-{0..9}.tar: 7 of 10 shards are missing, the first is"
    for pattern, fault in {
        "set/*.tar": "1 of 1 shards are missing",
        "train-{0..": "could not be expanded",
        "${NOWHERE}/0.tar": "could not be expanded",
        "a.tar::a.tar": "names a shard more than once",
    }.items():
        with pytest.raises(DataError) as caught:
            found(pattern, tmp_path)
        assert caught.value.field == "data.shards"
        assert fault in caught.value.problem


def test_a_source_is_called_as_its_shards_are() -> None:
    names = {
        ("a/train-000.tar", "a/train-001.tar"): "train",
        ("laion/00000.tar", "laion/00001.tar"): "laion",
        ("a b/0.tar",): "a_b",
        ("photos.tar",): "photos",
        ("x/train-0.tar", "x/val-0.tar"): "x",
        ("/0.tar",): "shards",
    }
    for paths, name in names.items():
        assert source_name([Path(path) for path in paths]) == name


def test_a_source_of_shards_is_unlabelled_and_has_the_classes_given(three: list[Path], tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "home", tmp_path, silent)
    source = store.source("set/train-{0..2}.tar", ("cat", "dog"), "a {}")
    assert (source.name, source.class_names, source.prompts[1]) == ("train", ("cat", "dog"), "a dog")
    assert (len(source.train), source.train.labels, source.test, source.val) == (10, None, None, None)
    assert len(source.train.digest) == 64
    odd = write_members(tmp_path / "set/odd.tar", ("a.png", encoded(0)), ("b.psd", b"x"))
    told: list[Event] = []
    names = ("red_panda", "dog\n")
    assert replace(store, report=told.append).source(str(odd), names, "a {}").prompts == [
        "a red panda",
        "a dog",
    ]
    assert Notice("odd: in samples without an image, 1 member of another type is skipped: 1 .psd") in told
    with pytest.raises(DataError, match="repeats class names"):
        store.source("set/train-{0..2}.tar", ("cat", "cat"), "a {}")


@pytest.fixture
def address(three: list[Path]) -> Iterator[str]:
    """Of a server of the three shards."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(three[0].parent.parent))
    with serving(handler) as port:
        yield f"http://127.0.0.1:{port}"


def test_shards_of_a_server_are_fetched_once_and_only_where_that_is_asked_for(
    three: list[Path], tmp_path: Path, address: str
) -> None:
    pattern = f"{address}/set/train-{{0..2}}.tar"
    with pytest.raises(DataError) as caught:
        found(pattern, tmp_path)
    assert (caught.value.field, caught.value.found) == ("data.shards", f"{address}/set/train-0.tar")
    first = found(pattern, tmp_path, fetch=True)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in three]
    assert source_name(first) == "train"
    for path in three:
        path.unlink()  # the server has nothing left
    assert found(pattern, tmp_path) == first


def test_what_cannot_be_fetched_is_told_and_leaves_nothing(three: list[Path], tmp_path: Path, address: str) -> None:
    (three[0].parent / "page.tar").write_text("<html>sign in</html>")
    for name, fault in {"absent.tar": "could not be fetched", "page.tar": "is not a tar"}.items():
        with pytest.raises(DataError) as caught:
            found(f"{address}/set/{name}", tmp_path, fetch=True)
        assert fault in caught.value.problem
        assert f"{address}/set/{name}" in str(caught.value)
    assert not [path for path in (tmp_path / "fetched").rglob("*.tar") if path.is_file()]
    with pytest.raises(DataError, match=r"s3://bucket/0\.tar could not be fetched"):
        found("s3://bucket/0.tar", tmp_path, fetch=True)


def test_a_command_runs_only_where_fetching_is_asked_for(three: list[Path], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = f"pipe:touch {mark} && cat {tmp_path}/set/train-{{0,2}}.tar"
    with pytest.raises(DataError, match="2 of 2 remote shards are not in"):
        found(command, tmp_path)
    assert not mark.exists()
    paths = found(command, tmp_path, fetch=True)
    assert mark.exists()
    assert [path.read_bytes() for path in paths] == [three[0].read_bytes(), three[2].read_bytes()]
    with pytest.raises(DataError, match="could not be fetched"):
        found(f"pipe:cat {tmp_path}/set/none.tar", tmp_path, fetch=True)
