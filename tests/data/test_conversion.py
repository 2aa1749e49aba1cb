"""How files become pixels: as a viewer shows them, or as Pillow's own conversion does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from comkd_cli.data.copy_plan import plan_copies
from comkd_cli.data.sources import open_source
from comkd_cli.edge.images import Conversion, open_image
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import Data, Images
from tests import tiny

AS_PUBLIC_CODE = Conversion(orient=False, alpha="drop", grey16="clip")
RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def pictures(folder: Path) -> dict[str, Path]:
    """An image of each kind that is read in more than one way, 4 x 3 pixels, without loss."""
    rgb = Image.fromarray(np.stack([RAMP, RAMP + 5, RAMP[::-1]], axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(RAMP))
    palette = rgb.quantize(8)
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    files = {name: folder / f"{name}.png" for name in ("plain", "oriented", "alpha", "palette", "keyed", "deep")}
    rgb.save(files["plain"])
    rgb.save(files["oriented"], exif=exif)
    rgba.save(files["alpha"])
    palette.save(files["palette"], transparency=3)
    rgb.save(files["keyed"], transparency=(0, 5, 160))
    deep.save(files["deep"])
    return files


@pytest.mark.parametrize("kind", ["plain", "oriented", "alpha", "palette", "keyed", "deep"])
def test_the_reading_of_the_public_code_is_pillows_conversion(tmp_path: Path, kind: str) -> None:
    path = pictures(tmp_path)[kind]
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(path, conversion=AS_PUBLIC_CODE)), expected)
    differs = not np.array_equal(np.asarray(open_image(path)), expected)
    assert differs == (kind != "plain")


def test_each_field_changes_its_own_kind_alone(tmp_path: Path) -> None:
    files = pictures(tmp_path)
    changes = {"oriented": {"orient": False}, "alpha": {"alpha": "drop"}, "deep": {"grey16": "clip"}}
    for kind, own in changes.items():
        for other, change in changes.items():
            read = np.asarray(open_image(files[kind], conversion=replace(Conversion(), **change)))  # type: ignore[arg-type]
            expected = open_image(files[kind], conversion=AS_PUBLIC_CODE if other == kind else Conversion())
            assert np.array_equal(read, np.asarray(expected)), (kind, own, other)


def test_a_source_reads_as_its_recipe_says_and_is_another_set_of_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            pictures(tmp_path / split / name)
    plain = Images(orient=False, alpha="drop", grey16="clip")
    upright, stored = (open_source(Data(folder=str(tmp_path), images=how), tmp_path) for how in (Images(), plain))
    position = [Path(key).name for key in stored.train.keys].index("alpha.png")
    with Image.open(tmp_path / "train/a/alpha.png") as image:
        assert np.array_equal(np.asarray(stored.train.open(position)), np.asarray(image.convert("RGB")))
    assert stored.train.digest != upright.train.digest
    assert stored.train.subset([0]).digest != upright.train.subset([0]).digest
    (line,) = [
        line
        for line in Identity({"data": stored.identity()}).differences({"data": upright.identity()}, "that run")
        if "conversion" in line
    ]
    assert line.startswith("data.conversion: not set in that run")


def test_shards_have_no_other_reading() -> None:
    fields = {"shards": "a.tar", "classes": ["x", "y"], "images": {"orient": False}}
    with pytest.raises(Exception, match="`images` needs `dataset` or `folder`"):
        parse_recipe(tiny.recipe(data=fields))


def test_no_copies_are_kept_of_images_that_are_converted_otherwise(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (300, 300)).save(tmp_path / "train" / name / "image.png")
    for how, is_planned in ((Images(), True), (Images(orient=False), False)):
        data = Data(folder=str(tmp_path), images=how, holdout_percent=0)
        images = open_source(data, tmp_path, tmp_path / "runs").train
        assert (plan_copies(images, data, lambda: 32, 0.08) is not None) == is_planned
    with pytest.raises(ValidationError, match="are always upright and on white"):
        Data(folder=str(tmp_path), images=Images(orient=False), resized=64)
