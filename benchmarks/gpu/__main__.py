"""What one GPU does in each of comkd's kinds of work, with random weights and without a network.

    python -m benchmarks.gpu [--minutes 8] [--seconds 1.5] [--only steps cache ...]
    python -m benchmarks.gpu --tiny        # models of a few thousand weights, on a CPU too: does everything still run?

In bf16, images per second, peak memory and the share of the card's dense bf16 rate (arithmetic counted by PyTorch) of:

- `steps`: a step of stage 2 from ViT-L/14 to ViT-B/16 (prompts), MobileCLIP2-S0 and MobileNetV4 small (all weights), by
  batch size from 8 to the largest that fits: the reference procedure (at batch 8: the teacher encodes the images and
  the prompts of 100 classes at each step), the teacher without and with a warm cache, the student alone, the training
  loop itself (`loop`, a warm cache and images in page-locked memory), and with torch.compile;
- `cache`: filling the teacher cache from images in page-locked memory;
- `stage_1`: PromptSRC at 100 and 1,000 classes, batch 4;
- `few_shot`: seconds of the few-shot methods with 1,000 classes, 16 shots and 50,000 test images of 512 dimensions;
- `loss_scaling`: fp16 with its scaler beside bf16;
- `sync_batch_norm`: SyncBatchNorm beside batch norms in one process.

Images are not decoded: `python -m benchmarks.loader` measures that. What has no time left within --minutes is listed
under `left_out`. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.measure import Budget, Meter
from benchmarks.gpu.others import as_numbers, cache_filling, few_shot, loss_scaling, shared_batch_norm, stage_1
from benchmarks.gpu.steps import MOST_BATCH, Pair, measure_steps
from comkd_cli.edge.machine import cpu_name
from comkd_cli.recipe.model import Model
from comkd_cli.training.accelerator import make_accelerator

TEACHER = Model(arch="ViT-L-14")
SGD, ADAMW = {"name": "sgd"}, {"name": "adamw", "learning_rate": 1e-4}
MOBILENET = {"image_size": 224, "timm_model_name": "mobilenetv4_conv_small", "timm_pool": "avg", "timm_proj": "none"}
PAIRS = {
    "ViT-B-16": Pair(TEACHER, Model(arch="ViT-B-16"), {"train": "prompts"}, SGD),
    "MobileCLIP2-S0": Pair(TEACHER, Model(arch="MobileCLIP2-S0"), {"train": "full"}, ADAMW),
    "MobileNetV4": Pair(TEACHER, Model(config={"embed_dim": 1280, "vision_cfg": MOBILENET}), {"train": "full"}, ADAMW),
}
TRANSFORMERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 10, "width": 16, "heads": 2, "layers": 2},
}
CONVOLUTIONS = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}
TINY_TEACHER, TINY_PROMPTS = Model(config=TRANSFORMERS), {"tokens": 2, "depth": 2}
TINY = {
    "prompts": Pair(TINY_TEACHER, TINY_TEACHER, {"train": "prompts", "prompts": TINY_PROMPTS}, SGD, **TINY_PROMPTS),
    "convolutions": Pair(
        TINY_TEACHER,
        Model(config={"embed_dim": 16, "vision_cfg": CONVOLUTIONS}),
        {"train": "full"},
        ADAMW,
        **TINY_PROMPTS,
    ),
}
SECTIONS = ("steps", "cache", "stage_1", "few_shot", "loss_scaling", "sync_batch_norm")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="small models, batch 8, without torch.compile")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs small models on a CPU")
    benchmark = Benchmark(options)
    document: dict[str, Any] = {**_machine(benchmark.device), "tiny": options.tiny}
    for section in SECTIONS:
        if section in options.only:
            document[section] = benchmark.section(section)
    document |= {"left_out": benchmark.budget.left_out, "seconds": time.monotonic() - benchmark.budget.started}
    print(json.dumps(as_numbers(document), indent=2))


class Benchmark:
    """The sections, each a method that returns plain data."""

    def __init__(self, options: argparse.Namespace) -> None:
        """options: of the command line."""
        self._accelerator = make_accelerator("bf16")
        self.device = self._accelerator.device
        self.budget = Budget(60 * options.minutes)
        self._meter = Meter(self.device, options.seconds)
        self._tiny = options.tiny
        self._pairs = TINY if options.tiny else PAIRS
        self._first, self._last = (list(self._pairs)[position] for position in (0, -1))

    def section(self, name: str) -> Any:
        """The figures of a section; None where there is no time left, and the error of one that fails."""
        print(f"{name} ...", file=sys.stderr)
        work: Callable[[], Any] = getattr(self, f"_{name}")
        try:
            return work()
        except Exception as error:  # the figures of the other sections are not lost
            return {"failed": f"{type(error).__name__}: {error}"}

    def _steps(self) -> dict[str, Any]:
        most, compiles = (8, False) if self._tiny else (MOST_BATCH, True)
        return {
            name: measure_steps(pair, 100, self._accelerator, self._meter, self.budget, most, compiles)
            for name, pair in self._pairs.items()
            if self.budget.allows(f"steps, {name}", 20)
        }

    def _cache(self) -> Any:
        pair, batches = self._pairs[self._first], 2 if self._tiny else 20
        return cache_filling(pair, self._accelerator, self._meter, batches) if self.budget.allows("cache", 20) else None

    def _stage_1(self) -> dict[int, Any]:
        return {
            classes: stage_1(self._pairs[self._first], classes, 4, self._accelerator, self._meter)
            for classes in ((5, 70) if self._tiny else (100, 1000))
            if self.budget.allows(f"stage 1, {classes} classes", 15)
        }

    def _few_shot(self) -> Any:
        sizes = (5, 4, 50, 16) if self._tiny else (1000, 16, 50_000, 512)
        return few_shot(*sizes, self.device) if self.budget.allows("few-shot", 60) else None

    def _loss_scaling(self) -> Any:
        precisions = ["bf16", "fp16"] if self.device.type == "cuda" else ["bf16"]
        pair, batch = self._pairs[self._first], 8 if self._tiny else 64
        if not self.budget.allows("loss scaling", 15):
            return None
        return loss_scaling(pair, batch, precisions, self._accelerator, self._meter)

    def _sync_batch_norm(self) -> Any:
        if self.device.type != "cuda" or not self.budget.allows("SyncBatchNorm", 10):  # it refuses CPU tensors
            return None
        pair, batch = self._pairs[self._last], 8 if self._tiny else 64
        return shared_batch_norm(pair, batch, self._accelerator, self._meter)


def _machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
