"""Small tar shards of random pictures."""

import gc
import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from comkd_cli.data.shard_indexing import open_index
from comkd_cli.data.shards import ShardImages, shard_images
from comkd_cli.events import Event


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
