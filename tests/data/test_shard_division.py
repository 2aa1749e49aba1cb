"""The index of shards in two parts, each an index like any other."""

from pathlib import Path

import numpy as np
import pytest

from comkd_cli.data.contents import Fingerprint
from comkd_cli.data.held_out import hold_out
from comkd_cli.data.holdout import Holdout
from comkd_cli.data.order import epoch_order
from comkd_cli.data.shard_division import divide_index
from comkd_cli.data.shard_indexing import open_index
from comkd_cli.data.shards import ShardImages, shard_images
from comkd_cli.data.source import Source
from tests.tars import samples, silent, write

COUNT = 60


def shards_of(folder: Path, *counts: int) -> list[Path]:
    paths, first = [], 0
    for number, count in enumerate(counts):
        paths.append(write(folder / f"train-{number}.tar", *samples(count, first)))
        first += count
    return paths


def divided(
    paths: list[Path], home: Path, percent: float = 30, by: Fingerprint = "contents"
) -> tuple[ShardImages, ShardImages]:
    parts = divide_index(open_index(paths, home, silent, by), Holdout(percent, by))
    assert parts is not None
    return shard_images(parts[0]), shard_images(parts[1])


def pixels(images: ShardImages) -> dict[str, bytes]:
    return {images.keys[position]: images.open(position).tobytes() for position in range(len(images))}


@pytest.mark.parametrize("fingerprint", ["contents", "size_and_time"])
def test_each_image_is_in_one_part_and_opens_as_in_the_whole(tmp_path: Path, fingerprint: Fingerprint) -> None:
    paths = shards_of(tmp_path / "set", 20, 1, 39)
    train, held = divided(paths, tmp_path / "home", by=fingerprint)
    whole = shard_images(open_index(paths, tmp_path / "home", silent, fingerprint))
    assert not pixels(train).keys() & pixels(held).keys()
    assert pixels(train) | pixels(held) == pixels(whole)
    assert len(held) > 0


def test_other_shards_and_more_images_change_no_side_and_no_digest(tmp_path: Path) -> None:
    train, held = divided(shards_of(tmp_path / "one", 20, 1, 39), tmp_path / "home")
    packed_train, packed = divided(shards_of(tmp_path / "two", COUNT), tmp_path / "home")
    assert (packed.digest, packed_train.digest) == (held.digest, train.digest)
    more_train, more = divided(shards_of(tmp_path / "three", COUNT, 30), tmp_path / "home")
    assert set(held.keys) < set(more.keys)
    assert set(train.keys) < set(more_train.keys)


def test_a_part_has_rows_and_an_order_of_its_own(tmp_path: Path) -> None:
    train, held = divided(shards_of(tmp_path / "set", 20, 1, 39), tmp_path / "home")
    for images in (train, held):
        assert sorted(images.rows.tolist()) == list(range(len(images)))
        order = epoch_order(images, seed=1, epoch=0)[0 : len(images)]
        assert sorted(np.asarray(order).tolist()) == list(range(len(images)))


def test_parts_are_kept_beside_the_index_and_made_again_where_they_are_damaged(tmp_path: Path) -> None:
    paths = shards_of(tmp_path / "set", COUNT)
    first, _ = divided(paths, tmp_path / "home")
    written = first.index.folder / "index.json"
    time = written.stat().st_mtime_ns
    assert divided(paths, tmp_path / "home")[0].digest == first.digest
    assert written.stat().st_mtime_ns == time
    written.write_text("{}")
    assert divided(paths, tmp_path / "home")[0].digest == first.digest


def test_a_source_of_shards_is_divided_without_labels(tmp_path: Path) -> None:
    images = shard_images(open_index(shards_of(tmp_path / "set", COUNT), tmp_path / "home", silent))
    source = hold_out(Source("set", ("a", "b"), "{}", images, None), 30, "contents", silent)
    assert source.test is not None
    assert (source.test.labels, source.holdout) == (None, Holdout(30))
    assert divide_index(images.index, Holdout(1e-9)) is None
