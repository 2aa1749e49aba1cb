"""How fast comkd's TrainingLoader decodes and crops JPEG files, beside a plain torchvision pipeline.

    python -m benchmarks.loader [--images 400] [--side 500] [--folder FOLDER] [--batch 64] [--workers N] [--rounds 3]

Images per second of: torchvision (ImageFolder's way to open a file, RandomResizedCrop, flip, ToTensor, Normalize, in a
DataLoader that shuffles); comkd with one pre-processing of 224 pixels; comkd with a teacher of 224 and a student of 256
pixels; and the same pair with a warm teacher cache, so that the teacher needs no input. All have the same files,
workers and batch size; each image counts once, whatever its number of inputs. The contenders alternate epoch by epoch;
a first epoch, in which workers start and files are read from the disk, is not counted. Without --folder images are
generated: gradients with noise of several scales, so that the files are about as large as those of photographs. Prints
one JSON document: median rates over the rounds, and their ratios to torchvision's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from comkd_cli.data.folder import images_below
from comkd_cli.data.loaders import Crops, Steps, TrainingLoader
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import Preprocessing
from comkd_cli.recipe.model import Augment
from comkd_cli.runtime.ranks import usable_cores

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEACHER, STUDENT = Preprocessing(224, MEAN, STD), Preprocessing(256, MEAN, STD)
AUGMENT = Augment()
# Cells per side of the noise, and its amplitude in grey values: finer structure is fainter, as in photographs.
OCTAVES = ((4, 60.0), (16, 30.0), (64, 20.0), (250, 16.0))
JPEG_QUALITY = 90


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--side", type=int, default=500)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.folder is None:
            make_pictures(Path(scratch), options.images, options.side)
        root = options.folder or Path(scratch)
        images = images_below(root)
        mean_bytes = statistics.mean((root / key).stat().st_size for key in images.keys)
        epochs = make_contenders(root, images, options.batch, options.workers)
        rates: dict[str, list[float]] = {name: [] for name in epochs}
        shown: dict[str, int] = {}
        for number in range(options.rounds + 1):
            for name, epoch in epochs.items():
                shown[name], rate = timed(epoch(number))
                if number:  # the first one starts the workers
                    rates[name].append(rate)
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    document = {
        "images_per_second": medians,
        "over_torchvision": {name: rate / medians["torchvision"] for name, rate in medians.items()},
        "images": len(images),
        "images_of_an_epoch": shown,
        "mean_file_bytes": mean_bytes,
        "workers": options.workers,
        "batch": options.batch,
        "rounds": options.rounds,
    }
    print(json.dumps(document, indent=2))


def make_contenders(
    root: Path, images: ImageSet, batch: int, workers: int
) -> dict[str, Callable[[int], Iterable[int]]]:
    """Each contender as a function from an epoch's number to the sizes of its batches."""
    plain = DataLoader(
        PlainImages([root / key for key in images.keys], TEACHER.size, AUGMENT.min_scale),
        batch_size=min(batch, len(images)),
        shuffle=True,
        num_workers=workers,
        # As in comkd: only whole batches, workers that outlive an epoch, and pinned memory if there is a GPU.
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )

    def comkd(preprocessings: list[Preprocessing], teacher_known: bool = False) -> Callable[[int], Iterable[int]]:
        known = _all_known if teacher_known else None
        loader = TrainingLoader(
            images, preprocessings, Crops(AUGMENT, seed=1), Steps(batch, seed=1), workers, is_cached=known
        )
        return lambda number: (len(batch) for (batch,) in loader.epoch(number))

    return {
        "torchvision": lambda _: map(len, plain),
        "comkd": comkd([TEACHER, TEACHER]),
        "comkd_two_sizes": comkd([TEACHER, STUDENT]),
        "comkd_two_sizes_teacher_known": comkd([TEACHER, STUDENT], teacher_known=True),
    }


class PlainImages(Dataset[torch.Tensor]):
    """The images as a training script without comkd reads them."""

    def __init__(self, paths: list[Path], size: int, min_scale: float) -> None:
        """size: of a crop, in pixels. min_scale: the least share of an image's area in it."""
        self._paths = paths
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size,
                    scale=(min_scale, 1.0),
                    interpolation=transforms.InterpolationMode.BICUBIC,
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(pil_loader(str(self._paths[index])))


def _all_known(_view: int, indices: np.ndarray) -> np.ndarray:
    return np.ones(len(indices), dtype=bool)


def timed(batch_sizes: Iterable[int]) -> tuple[int, float]:
    """The images of an epoch, and their rate from the request for the first batch to the arrival of the last."""
    started = time.perf_counter()
    images = sum(batch_sizes)
    return images, images / (time.perf_counter() - started)


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Square JPEG files, all different, the same at every call."""
    for number in range(count):
        random = np.random.default_rng(number)
        across = np.linspace(0, 1, side, dtype=np.float32)
        slopes, start = random.uniform(-80, 80, (2, 3)), random.uniform(60, 190, 3)
        pixels = start + across[:, None, None] * slopes[0] + across[None, :, None] * slopes[1]
        for cells, amplitude in OCTAVES:
            noise = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            smooth = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
            pixels += (np.asarray(smooth, dtype=np.float32) / 127.5 - 1) * amplitude
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:05}.jpg", quality=JPEG_QUALITY)


if __name__ == "__main__":
    main()
