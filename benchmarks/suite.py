"""`comkd evaluate --all` over datasets of the suite with their real split files, and again with features kept.

    python -m benchmarks.suite --splits FOLDER [--datasets dtd eurosat oxford_pets] [--arch ViT-S-32-alt]

FOLDER holds CoOp's split files, such as split_zhou_DescribableTextures.json. The images are made: each path is a link
to one of a few small JPEGs, so that scores mean nothing, and the numbers of images, classes and draws are the real
ones. The model has random weights. The command runs twice as a whole process, by every protocol: first every image is
encoded, then their features are read. Prints one JSON document: the seconds of both, and the records of each dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.evaluate import random_weights, timed
from comkd_cli.recipe.catalog import CATALOG

IMAGES, SIDE = 200, 64  # made JPEGs, in pixels


def make_data(root: Path, splits: Path, names: list[str]) -> dict[str, int]:
    """Write the datasets below a root. Returns their numbers of images."""
    made = root / "made"
    made.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(made / f"{number}.jpg")
    counts = {}
    for name in names:
        dataset = CATALOG[name]
        file = splits / str(dataset.split_file)
        entries = [entry for split in json.loads(file.read_text()).values() for entry in split]
        folder = root / dataset.folder
        for position, (path, _, _) in enumerate(entries):
            target = folder / dataset.images / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(made / f"{position % IMAGES}.jpg", target)
        (folder / file.name).write_bytes(file.read_bytes())
        counts[name] = len(entries)
    return counts


def main() -> None:
    """Make the data, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=["dtd", "eurosat", "oxford_pets"])
    parser.add_argument("--arch", default="ViT-S-32-alt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        counts = make_data(scratch, options.splits, options.datasets)
        model = f"{options.arch}:{random_weights(options.arch, scratch)}"
        command = ["-m", "comkd_cli", "evaluate", model, "--all", "--json"]
        command += ["--data-root", str(scratch), "--runs", str(scratch / "runs")]
        seconds = []
        for run in ("encoding", "with features kept"):
            said, taken = timed(command)
            seconds.append(taken)
            print(f"{run}: {taken:.0f} s", file=sys.stderr)
    document = {
        "arch": options.arch,
        "images": counts,
        "seconds": {"encoding": seconds[0], "features_kept": seconds[1]},
        "records": dict(Counter(record["dataset"] for record in json.loads(said)["records"])),
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
