"""Peak resident memory of a whole `comkd distill` process against the number of its images.

    python -m benchmarks.distill_memory [--images 1000 50000] [--views 1] [--workers 0]
    python -m benchmarks.distill_memory [--images 1000 50000] --no-cache

Makes folders of 32-pixel PNG files of noise, and distils a small zero-shot teacher with random weights into a smaller
student for one epoch, in a process of its own on the CPU. With --no-cache the recipe has no teacher_cache; otherwise
the cache is filled, and the mapped pages of its file count. Features, which the cache holds, have --dim numbers, as a
CLIP's do. With --workers above 0 the memory of the worker processes is not counted. Needs Linux's /proc. Prints one
JSON document: the peak, the cache's size and the seconds for each number of images, and the ratio of the peaks of the
most and the fewest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe import parse_recipe, to_yaml
from comkd_cli.recipe.model import Model

SIDE = 32
PER_FOLDER = 1000
POLL_SECONDS = 0.02
TOWER = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 10, "width": 16, "heads": 2, "layers": 1}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 50000])
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    if not Path("/proc/self/status").is_file():
        parser.error("reads peak memory from /proc, which this system does not have")
    cache = None if options.no_cache else {"views": options.views}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = {"embed_dim": options.dim, "vision_cfg": TOWER, "text_cfg": TEXT}
        weights = scratch / "teacher.pt"
        torch.save(build_clip(Model(config=config), seed=1).model.state_dict(), weights)
        found = {}
        for count in options.images:
            images = scratch / f"images{count}"
            make_images(images, count)
            recipe = recipe_of(images, config, weights, cache, options.workers, options.batch)
            found[count] = distil(recipe, scratch / f"runs{count}")
    document = {
        "by_images": found,
        "most_over_fewest_peak": found[max(found)]["peak_mib"] / found[min(found)]["peak_mib"],
        "teacher_cache": cache,
        "workers": options.workers,
        "batch": options.batch,
        "dim": options.dim,
    }
    print(json.dumps(document, indent=2))


def make_images(folder: Path, count: int) -> None:
    """Small images, all different, the same at every call."""
    random = np.random.default_rng(count)
    for number in range(count):
        path = folder / f"{number // PER_FOLDER:03}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=0)


def recipe_of(
    images: Path, config: dict[str, Any], weights: Path, cache: dict[str, Any] | None, workers: int, batch: int
) -> str:
    """The recipe of a run, as the text of a file."""
    recipe = {
        "data": {
            "folder": str(images),
            "classes": [f"thing number {n}" for n in range(10)],
            "workers": workers,
            "holdout_percent": 0,
        },
        "teacher": {"config": config, "weights": str(weights)},
        "student": {"config": {**config, "vision_cfg": {**TOWER, "layers": 1}}, "train": "full"},
        "optim": {"name": "adamw", "epochs": 1, "batch_size": batch},
        "teacher_cache": cache,
    }
    return to_yaml(parse_recipe(recipe))


def distil(recipe: str, runs: Path) -> dict[str, float]:
    """One run as a process: its peak memory, the size of its teacher cache and its time."""
    runs.mkdir()
    file, log = runs / "recipe.yaml", runs / "log.txt"
    file.write_text(recipe, encoding="utf-8")
    command = [sys.executable, "-m", "comkd_cli", "distill", str(file), "--runs", str(runs)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said, env=env) as child:
        peak = _last_peak_kib(child)
    seconds = time.perf_counter() - started
    if child.returncode:
        sys.exit(f"comkd distill failed:\n{log.read_text()}")
    cache_bytes = sum(path.stat().st_size for path in (runs / "cache").rglob("*") if path.is_file())
    return {"peak_mib": peak / 2**10, "cache_mib": cache_bytes / 2**20, "seconds": seconds}


def _last_peak_kib(child: subprocess.Popen[bytes]) -> int:
    """The highest resident memory of a process until it ends.

    Read from /proc: getrusage would also count the memory of this process when it started the child.
    """
    status, peak = Path(f"/proc/{child.pid}/status"), 0
    while child.poll() is None:
        # The status of a process that has just ended has no memory.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                peak = int(line.split()[1])
        time.sleep(POLL_SECONDS)
    return peak


if __name__ == "__main__":
    main()
