"""Images in shards against webdataset's own writer and reader."""

import functools
import gc
import http.server
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from comkd_cli.data import shards as shards_module
from comkd_cli.data.shards import (
    ShardImages,
    find_shards,
    open_index,
    read_members,
    shard_images,
    shard_source,
    source_name,
)
from comkd_cli.data.source import sampled_content
from comkd_cli.errors import DataError
from comkd_cli.predictor import UnreadableImage, open_image
from comkd_cli.progress import Event, Progress

Noise = Callable[..., Image.Image]


def encoded(number: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def samples(count: int, first: int = 0, prefix: str = "") -> list[dict[str, Any]]:
    """As img2dataset writes them: an image, its caption and what else is known of it."""
    return [
        {"__key__": f"{prefix}{n:09d}", "png": encoded(n), "txt": f"number {n}", "json": {"n": n}}
        for n in range(first, first + count)
    ]


def write(path: Path, *contents: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for content in contents:
            writer.write(content)
    return path


def write_members(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def read_by_webdataset(*paths: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the shards open
        found = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
        gc.collect()
    return found


def silent(_event: Event) -> None:
    pass


def opened(*paths: Path, home: Path) -> ShardImages:
    return shard_images(open_index(paths, home, silent))


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Shards of 4, 1 and 5 samples."""
    counts = ((4, 0), (1, 4), (5, 5))
    return [write(tmp_path / f"set/train-{n}.tar", *samples(*count)) for n, count in enumerate(counts)]


# --- what is read -----------------------------------------------------------------------------------------


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
    assert chosen.sizes_bytes == (len(encoded(7)), len(encoded(0)))
    assert chosen.open(0).tobytes() == images.open(7).tobytes()
    assert (chosen.rows, chosen.runs_on_disk) == (None, None)
    again = pickle.loads(pickle.dumps(chosen))
    assert again.open(1).tobytes() == images.open(0).tobytes()


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
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
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


# --- what is refused --------------------------------------------------------------------------------------


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
        with pytest.raises(DataError, match=rf"{name}\.tar: can't be read as a tar.*fetch or write it anew"):
            opened(path, home=tmp_path / "home")
        with pytest.raises(DataError) as caught:
            list(read_members(path))
        assert ("in or after the sample" in str(caught.value)) == (name not in ("empty", "noise"))


def test_shards_without_images_or_compressed_ones_are_told(tmp_path: Path) -> None:
    none = write(tmp_path / "none.tar", {"__key__": "a", "txt": "words"})
    with pytest.raises(DataError, match=r"none\.tar: holds no images; comkd reads .*KEY\.jpg"):
        opened(none, home=tmp_path / "home")
    nothing = write_members(tmp_path / "nothing.tar")
    with pytest.raises(DataError, match=r"nothing\.tar: holds no images"):
        opened(nothing, home=tmp_path / "home")
    packed = tmp_path / "packed.tar.gz"
    write(packed, *samples(1))
    with pytest.raises(DataError, match=r"packed\.tar\.gz: is compressed \(gzip\); decompress it"):
        opened(packed, home=tmp_path / "home")


def test_a_key_that_comes_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    apart = write(tmp_path / "apart.tar", *samples(2), *samples(1))
    with pytest.raises(DataError, match=r"apart\.tar: holds the sample '000000000' twice"):
        opened(apart, home=tmp_path / "home")
    beside = write_members(tmp_path / "beside.tar", ("a.png", encoded(0)), ("a.png", encoded(1)))
    with pytest.raises(DataError, match=r"beside\.tar: a\.png is there twice"):
        opened(beside, home=tmp_path / "home")


def test_keys_that_come_again_in_another_shard_get_the_shards_name(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, *samples(3)) for name in ("00000.tar", "00001.tar"))
    images = opened(first, second, home=tmp_path / "home")
    assert list(images.keys) == [f"{shard}/{n:09d}" for shard in ("00000", "00001") for n in range(3)]
    assert sorted(images.rows.tolist()) == list(range(6))
    assert list(pickle.loads(pickle.dumps(images)).keys) == list(images.keys)
    alike = write(tmp_path / "elsewhere/00000.tar", *samples(3))
    with pytest.raises(DataError, match=r"both hold the sample 00000/00000000\d, and are called alike; rename"):
        opened(first, alike, home=tmp_path / "home")


# --- the index --------------------------------------------------------------------------------------------


def test_an_index_is_made_once_and_anew_for_a_changed_shard(three: list[Path], tmp_path: Path) -> None:
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


def test_a_killed_indexing_goes_on_at_the_next_shard(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    members = shards_module.read_members

    def counted(path: Path) -> Iterator[tuple[str, int, int]]:
        read.append(path.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return members(path)

    monkeypatch.setattr(shards_module, "read_members", counted)
    with pytest.raises(KeyboardInterrupt):
        open_index(three, tmp_path / "home", silent)
    assert len(open_index(three, tmp_path / "home", silent)) == 10
    assert read == ["train-0.tar", "train-1.tar", "train-2.tar", "train-2.tar"]


def test_parts_that_another_process_has_done_with_are_made_again(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = shards_module._make_parts

    def half(paths: list[Path], parts: Path, report: Any) -> None:
        make(paths, parts, report)
        (parts / "000001.npz").unlink()

    monkeypatch.setattr(shards_module, "_make_parts", half)
    assert len(open_index(three, tmp_path / "home", silent)) == 10


def test_processes_that_make_the_same_index_at_once_do_not_disturb_one_another(
    three: list[Path], tmp_path: Path
) -> None:
    # An executor, for a pool of multiprocessing would wait for ever for one that died.
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        found = [
            future.result() for future in [pool.submit(open_index, three, tmp_path / "home", silent) for _ in range(3)]
        ]
    assert {(index.digest, len(index)) for index in found} == {(open_index(three, tmp_path, silent).digest, 10)}
    assert [path.name for path in (tmp_path / "home").iterdir()] == [found[0].folder.name]


def test_a_damaged_index_is_made_anew(three: list[Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    whole = open_index(three, home, silent)
    expected, digest = list(shard_images(whole).keys), whole.digest
    for name, content in (("offsets.bin", b"x"), ("index.json", b"{"), ("index.json", b'{"format": "other"}')):
        (whole.folder / name).write_bytes(content)
        again = open_index(three, home, silent)
        assert (list(shard_images(again).keys), again.digest) == (expected, digest)


def test_processes_side_by_side_make_the_same_index(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = open_index(three, tmp_path / "alone", silent)
    monkeypatch.setattr(shards_module, "SHARDS_PER_PROCESS", 1)
    monkeypatch.setattr(shards_module, "_usable_cores", lambda: 2)
    together = open_index(three, tmp_path / "together", silent)
    names = sorted(path.name for path in alone.folder.iterdir())
    assert names == sorted(path.name for path in together.folder.iterdir())
    assert all((alone.folder / name).read_bytes() == (together.folder / name).read_bytes() for name in names)
    three[1].write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"train-1\.tar: can't be read as a tar"):
        open_index(three, tmp_path / "together", silent)


def test_the_index_does_not_depend_on_how_much_is_held_in_memory(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_index(three, tmp_path / "whole", silent)
    monkeypatch.setattr(shards_module, "RANKED_AT_ONCE", 2)
    pieces = open_index(three, tmp_path / "pieces", silent)
    assert (pieces.digest, pieces.rows.tolist()) == (whole.digest, whole.rows.tolist())
    assert pieces.spaced(3) == whole.spaced(3)


def test_keys_whose_hashes_agree_are_told_apart_by_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_hashes", lambda keys: np.array([len(key) for key in keys], dtype="<u8"))
    content = [{"__key__": key, "png": encoded(n)} for n, key in enumerate(("b", "cc", "a", "dd", "c", "eee"))]
    one = opened(write(tmp_path / "one.tar", *content), home=tmp_path / "home")
    assert one.rows.tolist() == [1, 3, 0, 4, 2, 5]
    other = opened(write(tmp_path / "other.tar", *content[::-1]), home=tmp_path / "home")
    assert other.rows.tolist() == one.rows.tolist()[::-1]
    assert other.identity() == one.identity()
    repeated = write(tmp_path / "repeated.tar", *content[:3], content[0])
    with pytest.raises(DataError, match="holds the sample 'b' twice"):
        opened(repeated, home=tmp_path / "home")


def test_what_a_set_is_does_not_depend_on_which_shard_holds_what(three: list[Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    images = opened(*three, home=home)
    mixed = [samples(10)[n] for n in (3, 9, 1, 4, 7, 0, 2, 8, 6, 5)]
    packed = opened(write(tmp_path / "p/0.tar", *mixed[:7]), write(tmp_path / "p/1.tar", *mixed[7:]), home=home)
    assert packed.identity() == images.identity()
    assert sampled_content(packed, 3) == sampled_content(images, 3)
    row_of = dict(zip(images.keys, images.rows.tolist(), strict=True))
    assert [row_of[key] for key in packed.keys] == packed.rows.tolist()
    assert sorted(row_of.values()) == list(range(10))
    without = opened(write(tmp_path / "q.tar", *mixed[:9]), home=home)
    other_size = [{**sample, "png": sample["png"] + b" "} for sample in mixed[:1]] + mixed[1:]
    changed = opened(write(tmp_path / "r.tar", *other_size), home=home)
    renamed = opened(write(tmp_path / "s.tar", *samples(10, prefix="x")), home=home)
    assert len({str(each.identity()) for each in (images, without, changed, renamed)}) == 4


# --- which shards -----------------------------------------------------------------------------------------


def found(pattern: str, root: Path, fetch: bool = False) -> list[Path]:
    return find_shards(pattern, root, root / "fetched", silent, fetch)


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
    told = str(caught.value)
    assert told.startswith("data.shards: set/train-{0..9}.tar: 7 of 10 shards are missing, the first is ")
    assert f"{tmp_path}/set/train-3.tar; correct the pattern" in told
    for pattern, fault in {
        "set/*.tar": r"1 of 1 shards are missing.*\* for none",
        "train-{0..": "can't be expanded",
        "${NOWHERE}/0.tar": "can't be expanded",
        "a.tar::a.tar": "names a.tar more than once",
    }.items():
        with pytest.raises(DataError, match=rf"^data\.shards: (.|\n)*{fault}"):
            found(pattern, tmp_path)


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
    source = shard_source("set/train-{0..2}.tar", ("cat", "dog"), "a {}", tmp_path, tmp_path / "home", silent)
    assert (source.name, source.class_names, source.prompts[1]) == ("train", ("cat", "dog"), "a dog")
    assert (len(source.train), source.train.labels, source.test, source.val) == (10, None, None, None)
    assert len(source.fingerprint()) == 64
    with pytest.raises(DataError, match=r"data\.classes: the class list repeats"):
        shard_source("set/train-{0..2}.tar", ("cat", "cat"), "a {}", tmp_path, tmp_path / "home", silent)


# --- from elsewhere ---------------------------------------------------------------------------------------


@pytest.fixture
def address(three: list[Path]) -> Iterator[str]:
    """Of a server of the three shards."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(three[0].parent.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_shards_of_a_server_are_fetched_once_and_only_where_that_is_asked_for(
    three: list[Path], tmp_path: Path, address: str
) -> None:
    pattern = f"{address}/set/train-{{0..2}}.tar"
    with pytest.raises(DataError, match=r"3 of 3 remote shards are not below .*train-0\.tar; `comkd distill` fetches"):
        found(pattern, tmp_path)
    first = found(pattern, tmp_path, fetch=True)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in three]
    assert source_name(first) == "train"
    for path in three:
        path.unlink()  # the server has nothing left
    assert found(pattern, tmp_path) == first


def test_what_cannot_be_fetched_is_told_and_leaves_nothing(three: list[Path], tmp_path: Path, address: str) -> None:
    (three[0].parent / "page.tar").write_text("<html>sign in</html>")
    for name, fault in {"absent.tar": "can't be fetched", "page.tar": "is no tar"}.items():
        with pytest.raises(DataError, match=rf"data\.shards: {address}/set/{name} {fault}"):
            found(f"{address}/set/{name}", tmp_path, fetch=True)
    assert not [path for path in (tmp_path / "fetched").rglob("*.tar") if path.is_file()]
    with pytest.raises(DataError, match=r"data\.shards: s3://bucket/0\.tar can't be fetched"):
        found("s3://bucket/0.tar", tmp_path, fetch=True)


def test_a_command_runs_only_where_fetching_is_asked_for(three: list[Path], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = f"pipe:touch {mark} && cat {tmp_path}/set/train-{{0,2}}.tar"
    with pytest.raises(DataError, match="2 of 2 remote shards are not below"):
        found(command, tmp_path)
    assert not mark.exists()
    paths = found(command, tmp_path, fetch=True)
    assert mark.exists()
    assert [path.read_bytes() for path in paths] == [three[0].read_bytes(), three[2].read_bytes()]
    with pytest.raises(DataError, match="can't be fetched"):
        found(f"pipe:cat {tmp_path}/set/none.tar", tmp_path, fetch=True)
