"""What copies of decoded images gain (`data.resized`): epochs over photos, beside a plain torchvision DataLoader.

    python -m benchmarks.photos [--photos 64] [--small 400] [--later 2] [--batch 32] [--workers N] [--min-scale 0.4]

Two sets of JPEG files: photos of 4000 x 3000 pixels, and images of 500 x 375. Each goes to random crops of 224 pixels
of at least 40 % of the image, as `comkd init` proposes them: by torchvision (ImageFolder's way to open a file,
RandomResizedCrop, flip, ToTensor, Normalize, in a DataLoader that shuffles), and by comkd's TrainingLoader with the
copies of `data.resized: auto`. Both have the same files, workers and batch size. comkd starts with an empty folder of
copies; its first epoch is compared with torchvision's first (both start their workers in it), its later ones with
torchvision's second. The pictures are gradients with noise of several scales; eight are drawn, and the files differ in
bytes after the end of the JPEG, so that each has its own copy.

Prints one JSON document: images per second, ratios to torchvision's, the time of a run of 20 epochs as the sum of a
first and 19 later epochs over that of torchvision, peak memory of all processes after the first and after the last
epoch, and how far crops from copies are from crops of the images, in levels of 255, beside what JPEG of quality 95
changes in them.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.loader import MEAN, STD, PlainImages
from comkd_cli.data.copy_plan import plan_copies, with_copies
from comkd_cli.data.folder import images_below
from comkd_cli.data.loaders import Crops, Steps, TrainingLoader
from comkd_cli.data.source import ImageSet
from comkd_cli.data.transforms import training_inputs
from comkd_cli.edge.images import Preprocessing
from comkd_cli.recipe.model import Augment, Data
from comkd_cli.runtime.ranks import usable_cores

INPUT = Preprocessing(224, MEAN, STD)
DISTINCT = 8
EPOCHS = 20
# Cells on the long side of the noise, and its amplitude in levels: finer structure is fainter, as in photographs.
OCTAVES = ((4, 60.0), (16, 30.0), (64, 20.0), (250, 14.0), (1000, 9.0), (2600, 7.0))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--small", type=int, default=400)
    parser.add_argument("--photo-width", type=int, default=4000)
    parser.add_argument("--small-width", type=int, default=500)
    parser.add_argument("--later", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--min-scale", type=float, default=0.4)
    options = parser.parse_args()
    augment = Augment(min_scale=options.min_scale)
    document: dict[str, object] = {}
    for name, count, width in (
        ("photos", options.photos, options.photo_width),
        ("small", options.small, options.small_width),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch, "images")
            root.mkdir()
            make_photos(root, count, width)
            document[name] = measured(root, Path(scratch, "runs"), augment, options)
    document |= {"workers": options.workers, "batch": options.batch, "min_scale": options.min_scale}
    print(json.dumps(document, indent=2))


def measured(root: Path, runs: Path, augment: Augment, options: argparse.Namespace) -> dict[str, object]:
    """Rates, ratios, memory and differences of one set of files."""
    images = images_below(root)
    data = Data(folder=str(root), classes=("x", "y"))
    plan = plan_copies(images, data, lambda: INPUT.size, augment.min_scale)
    copied = with_copies(images, plan, data, runs, lambda event: None)
    batch = min(options.batch, len(images))
    plain = DataLoader(
        PlainImages([root / key for key in images.keys], INPUT.size, augment.min_scale),
        batch_size=batch,
        shuffle=True,
        num_workers=options.workers,
        drop_last=True,
        persistent_workers=options.workers > 0,
    )
    loader = TrainingLoader(copied, [INPUT, INPUT], Crops(augment, 1), Steps(batch, 1), options.workers)
    theirs = [seconds_per_image(map(len, plain))]
    ours = [seconds_per_image(len(part) for (part,) in loader.epoch(0))]
    memory = [peak_memory()]
    theirs.append(seconds_per_image(map(len, plain)))
    ours += [seconds_per_image(len(part) for (part,) in loader.epoch(number)) for number in range(1, options.later + 1)]
    memory.append(peak_memory())
    later = statistics.median(ours[1:])
    return {
        "images": len(images),
        "mean_file_bytes": statistics.mean((root / key).stat().st_size for key in images.keys),
        "short_side_of_copies": None if plan is None else plan.short_side,
        "bytes_of_a_copy": None if plan is None else plan.bytes_per_image,
        "images_per_second": {
            "torchvision": [1 / seconds for seconds in theirs],
            "first_epoch": 1 / ours[0],
            "later_epochs": 1 / later,
        },
        "over_torchvision": {
            "first_epoch": theirs[0] / ours[0],
            "later_epochs": theirs[1] / later,
            f"run_of_{EPOCHS}_epochs": (theirs[0] + (EPOCHS - 1) * theirs[1]) / (ours[0] + (EPOCHS - 1) * later),
        },
        "peak_memory_mib": {"after_the_first_epoch": memory[0], "after_the_last": memory[1]},
        "difference_of_crops": differences(images, copied, augment),
    }


def seconds_per_image(batch_sizes: Iterable[int]) -> float:
    """The time of an epoch, from the request for its first batch to the arrival of the last, over its images."""
    started = time.perf_counter()
    images = sum(batch_sizes)
    return (time.perf_counter() - started) / images


def differences(images: ImageSet, copied: ImageSet, augment: Augment) -> dict[str, float]:
    """Mean absolute differences of crops, in levels of 255."""
    from_copies, from_jpeg = [], []
    plain = Preprocessing(INPUT.size, (0.0,) * 3, (1.0,) * 3)
    for index in range(min(DISTINCT, len(images))):
        for seed in range(3):
            reference, crop = (
                (training_inputs(image, [plain], augment, seed)[0] * 255).numpy()
                for image in (images.open(index), copied.open_to_crop(index))
            )
            stream = io.BytesIO()
            levels = reference.round().astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(levels).save(stream, "JPEG", quality=95)
            from_copies.append(np.abs(crop - reference).mean())
            from_jpeg.append(np.abs(np.asarray(Image.open(stream)).astype(np.float32) - levels).mean())
    return {"copies": float(np.mean(from_copies)), "jpeg_95": float(np.mean(from_jpeg))}


def peak_memory() -> float | None:
    """Of this process and its workers, in MiB; None where the system does not say it."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    try:
        lines = [line for each in processes for line in Path(f"/proc/{each}/status").read_text().splitlines()]
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def make_photos(folder: Path, count: int, width: int) -> None:
    """JPEG files of width x 3/4 width, the same at every call."""
    height = width * 3 // 4
    for number in range(min(count, DISTINCT)):
        random = np.random.default_rng(number)
        pixels = np.full((height, width, 3), random.uniform(60, 190, 3), dtype=np.float32)
        for cells, amplitude in OCTAVES:
            if cells <= width:
                noise = random.integers(0, 256, (max(1, cells * 3 // 4), cells, 3), dtype=np.uint8)
                smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
                pixels += (np.asarray(smooth, dtype=np.float32) / 127.5 - 1) * amplitude
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
        for copy in range(number, count, DISTINCT):
            (folder / f"{copy:05}.jpg").write_bytes(stream.getvalue() + copy.to_bytes(4, "big"))


if __name__ == "__main__":
    main()
