"""Every command as a real process on a folder whose images break decoders: named, counted, and nothing hangs."""

import json
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

from comkd_cli.data.digits import digits_source
from tests import tiny, warm

pytestmark = pytest.mark.slow


def comkd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run(*arguments, cwd=folder)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bare_palette() -> bytes:
    """A palette PNG without its palette."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(8)) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def unknown_dds() -> bytes:
    """A DDS file of a pixel format that Pillow does not implement."""
    whole = bytearray(encoded(Image.new("RGB", (8, 8)), "DDS"))
    whole[80:88] = struct.pack("<I4s", 4, b"XXXX")
    return bytes(whole)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits, a fifth of them damaged, in train/ and in test/, and a recipe for it."""
    folder = tmp_path_factory.mktemp("workshop")
    source = digits_source()
    for split, images in (("train", source.train), ("test", source.test)):
        assert images is not None
        assert images.labels is not None
        for index in range(60):
            home = folder / "few" / split / str(images.labels[index])
            home.mkdir(parents=True, exist_ok=True)
            images.open(index).save(home / f"{index}.png")
        whole = encoded(images.open(0).resize((64, 64)), "PNG")
        (folder / "few" / split / "3/palette.png").write_bytes(bare_palette())
        (folder / "few" / split / "3/dds.png").write_bytes(unknown_dds())
        (folder / "few" / split / "3/cut.png").write_bytes(whole[: len(whole) // 2])
        (folder / "few" / split / "3/empty.png").write_bytes(b"")
        Image.new("RGB", (65000, 65), "red").save(folder / "few" / split / "3/strip.png")  # which can be read
    data = {"folder": "few", "workers": 1, "unreadable_limit_percent": 10.0}
    teacher = {"config": tiny.CLIP, "adapt": {"method": "full", "epochs": 1, "batch_size": 16}}
    recipe = tiny.recipe(data=data, teacher=teacher, optim={**tiny.OPTIM, "batch_size": 16})
    with (folder / "few.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(recipe, stream)
    return folder


BROKEN = ("palette.png", "dds.png", "cut.png", "empty.png")


def test_what_can_be_read_is_learned_from_scored_and_named(workshop: Path) -> None:
    trained = comkd(workshop, "distill", "few.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr
    assert "Warning" not in trained.stderr
    assert all(f"{split}/3/{name}: " in trained.stderr for name in BROKEN for split in ("train", "test"))
    assert "4 of 65 test images could not be read" in trained.stderr
    run = workshop / "runs/few/few/seed1"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["test_images"], last["test_unreadable"], last["unreadable"]) == (61, 4, 4)

    scored = comkd(workshop, "evaluate", str(run / "student.pt"))
    assert scored.returncode == 0, scored.stderr
    assert all(f"{name}: " in scored.stderr for name in BROKEN)
    student = json.loads((run / "results.json").read_text())["records"][0]
    assert (student["images"], student["unreadable"]) == (61, 4)
    assert student["top1_percent"] == last["test_top1_percent"]

    exported = comkd(workshop, "export", str(run / "student.pt"))
    assert exported.returncode == 0, exported.stderr
    card = (run / "bundle/README.md").read_text()
    assert "Top-1 on 61 test images, in PyTorch" in card
    assert "4 more could not be read" in card

    images = [f"few/test/3/{name}" for name in (*BROKEN, "strip.png")]
    for command in ([sys.executable, "-m", "comkd_cli", "predict", str(run / "bundle")], predict_py(run)):
        named = subprocess.run(
            [*command, *images, "--json"], cwd=workshop, capture_output=True, text=True, check=False, timeout=240
        )
        assert named.returncode == 1
        assert "Traceback" not in named.stderr
        records = json.loads(named.stdout)["predictions"]
        assert ["error" in record for record in records] == [True, True, True, True, False]
        assert all(record["error"].startswith(image) for record, image in zip(records[:4], images, strict=False))


def predict_py(run: Path) -> list[str]:
    return [sys.executable, str(run / "bundle/predict.py")]


def test_a_lower_limit_stops_every_command_that_scores(workshop: Path) -> None:
    low = ("--set", "data.unreadable_limit_percent=5")
    trained = comkd(workshop, "distill", "few.yaml", "--runs", "low", *low)
    assert trained.returncode == 1
    assert "Traceback" not in trained.stderr
    assert "could not be read (allowed: 5 %)" in trained.stderr
