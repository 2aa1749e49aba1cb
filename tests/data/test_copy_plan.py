"""Which images get copies, of what size, and how much space all copies may take."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comkd_cli.data import copy_plan
from comkd_cli.data.copy_plan import plan_copies, short_side_of_crops, with_copies
from comkd_cli.data.folder import images_below
from comkd_cli.data.shards import ShardStore
from comkd_cli.data.source import ImageSet
from comkd_cli.events import Event, Notice
from comkd_cli.recipe.model import Data
from tests.tars import write_members

CLASSES = ("a", "b")


def input_of_64() -> int:
    return 64


def folder_of(home: Path, sides: list[int]) -> ImageSet:
    home.mkdir()
    for number, side in enumerate(sides):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side * 2, side)).save(home / f"{number:02}.jpg")
    return images_below(home)


def data(**fields: object) -> Data:
    return Data.model_validate({"folder": "x", "classes": CLASSES, **fields})


@pytest.mark.parametrize(
    ("size", "min_scale", "expected"), [(224, 0.4, 355), (224, 0.08, 792), (224, 0.25, 448), (336, 1.0, 336)]
)
def test_the_short_side_of_auto(size: int, min_scale: float, expected: int) -> None:
    assert short_side_of_crops(size, min_scale) == expected  # 224 / sqrt(0.4) = 354.2, and so on


def test_auto_makes_copies_where_a_tenth_of_the_images_is_larger(tmp_path: Path) -> None:
    one_in_ten = folder_of(tmp_path / "one", [130] + [100] * 9)
    one_in_eleven = folder_of(tmp_path / "two", [130] + [100] * 10)
    found = plan_copies(one_in_ten, data(), input_of_64, 0.4)
    assert found is not None
    assert found.short_side == 102
    assert plan_copies(one_in_eleven, data(), input_of_64, 0.4) is None
    assert plan_copies(one_in_ten, data(resized="off"), input_of_64, 0.4) is None
    assert plan_copies(one_in_ten, data(), input_of_64, 0.1) is None  # 203 pixels
    assert plan_copies(one_in_ten, Data(dataset="dtd"), input_of_64, 0.4) is None


def test_a_number_is_the_short_side_of_any_images(tmp_path: Path) -> None:
    small = folder_of(tmp_path / "small", [40, 60])
    for chosen in (data(resized=90), Data(dataset="dtd", resized=90)):
        found = plan_copies(small, chosen, input_of_64, 0.4)
        assert found is not None
        assert found.short_side == 90


def test_small_images_have_no_copies_whatever_the_input(tmp_path: Path) -> None:
    assert plan_copies(folder_of(tmp_path / "x", [128] * 3), data(), lambda: 16, 1.0) is None
    assert plan_copies(folder_of(tmp_path / "y", [129] * 3), data(), lambda: 16, 1.0) is not None


def test_the_size_that_is_reported_is_the_size_of_the_files(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "x", [200] * 4)
    plan = plan_copies(images, data(), input_of_64, 0.4)
    assert plan is not None
    events: list[Event] = []
    copied = with_copies(images, plan, data(), tmp_path / "runs", events.append)
    for index in range(4):
        copied.open_to_crop(index)
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) == 4
    assert sum(path.stat().st_size for path in written) == plan.size_bytes(4) == 4 * (204 * 102 * 3 + 28)
    assert [event.text for event in events if isinstance(event, Notice)] == [
        f"resized copies: 0 of 4 made; short side 102 pixels, about 0.2 MB for 4 images in {tmp_path}/runs/resized/102"
    ]
    with_copies(images, plan, data(), tmp_path / "runs", events.append)
    assert isinstance(events[-1], Notice)
    assert "4 of 4 made" in events[-1].text


def test_copies_keep_to_their_bound_and_the_same_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder_of(tmp_path / "x", [200] * 40)
    plan = plan_copies(images, data(), input_of_64, 0.4)
    assert plan is not None
    monkeypatch.setattr(copy_plan, "MOST_BYTES", int(plan.size_bytes(20)))
    kept = []
    for runs in ("first", "second"):
        events: list[Event] = []
        copied = with_copies(images, plan, data(), tmp_path / runs, events.append)
        assert isinstance(events[-1], Notice)
        assert "space for about 50% of the 40 missing" in events[-1].text
        for index in range(40):
            copied.open_to_crop(index)
        kept.append(sorted(path.name for path in (tmp_path / runs).rglob("*") if path.is_file()))
    assert kept[0] == kept[1]
    assert 8 <= len(kept[0]) <= 32  # of digests, the share is one on average


def test_what_killed_processes_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "x", [200] * 2)
    plan = plan_copies(images, data(), input_of_64, 0.4)
    left = tmp_path / "runs/resized/102/ab"
    left.mkdir(parents=True)
    for name, age in (("old", 7200), ("new", 0)):
        (left / f".unfinished.{name}").write_bytes(b"part")
        os.utime(left / f".unfinished.{name}", (time.time() - age,) * 2)
    with_copies(images, plan, data(), tmp_path / "runs", lambda event: None)
    assert [path.name for path in left.iterdir()] == [".unfinished.new"]


def test_images_of_shards_share_no_file_and_have_copies(tmp_path: Path) -> None:
    folder_of(tmp_path / "x", [200] * 3)
    write_members(tmp_path / "it.tar", *((path.name, path.read_bytes()) for path in sorted((tmp_path / "x").iterdir())))
    store = ShardStore(tmp_path / "home", tmp_path, lambda event: None)
    images = store.source(str(tmp_path / "it.tar"), CLASSES, "a {}").train
    chosen = Data.model_validate({"shards": "it.tar", "classes": CLASSES})
    plan = plan_copies(images, chosen, input_of_64, 0.4)
    assert plan is not None
    copied = with_copies(images, plan, chosen, tmp_path / "runs", lambda event: None)
    first = [copied.open_to_crop(index).pixels for index in range(3)]  # type: ignore[union-attr]
    assert len([path for path in (tmp_path / "runs").rglob("*") if path.is_file()]) == 3
    (tmp_path / "it.tar").unlink()
    assert all(
        np.array_equal(copied.open_to_crop(index).pixels, first[index])  # type: ignore[union-attr]
        for index in range(3)
    )
