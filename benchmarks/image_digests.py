"""The time to find out whether the files of a folder are unchanged.

    python -m benchmarks.image_digests [--files 50000] [--bytes 3000] [--folder FOLDER] [--rounds 3]

Files of random bytes are made in a temporary folder unless --folder names one with images. The first pass reads each
file and remembers its digest; later passes compare sizes and times. Prints one JSON document: seconds of the first
pass, and the median of the later ones, for the index that commands keep under RUNS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from comkd_cli.data.contents import SETTLED_AFTER_SECONDS, FileContents
from comkd_cli.data.folder import images_below

FILES_PER_FOLDER = 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=3_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch, "images")
        if options.folder is None:
            make_files(root, options.files, options.bytes)
            time.sleep(SETTLED_AFTER_SECONDS)  # digests of files that have just changed are not remembered
        index = Path(scratch, "digests.sqlite")
        seconds = [seconds_of_pass(root, index) for _ in range(options.rounds + 1)]
        files = len(images_below(root))
    document = {
        "files": files,
        "first_pass_seconds": seconds[0],
        "later_pass_seconds": statistics.median(seconds[1:]),
    }
    print(json.dumps(document, indent=2))


def make_files(root: Path, files: int, size_bytes: int) -> None:
    """Files with the names of images; nothing decodes them."""
    for number in range(files):
        path = root / f"{number // FILES_PER_FOLDER:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size_bytes))


def seconds_of_pass(root: Path, index: Path) -> float:
    """The time of a digest of all images below a folder, without listing them."""
    images = images_below(root)
    images = replace(images, contents=FileContents(root, index=index))
    started = time.perf_counter()
    assert images.digest
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
