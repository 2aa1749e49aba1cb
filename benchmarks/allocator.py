"""How much time a training step on a CPU saves by keeping freed memory, in paired processes.

    python -m benchmarks.allocator [--pairs 3] [--steps 20]

Prints one JSON document: seconds per step of the convolutional teacher of recipes/cifar10.yaml at batch 128
with glibc's defaults and with comkd_cli.runtime.allocator, the medians, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

STEP = """
import sys, time, torch
from comkd_cli.runtime.allocator import keep_freed_memory
from comkd_cli.models.backbones import build_clip
from comkd_cli.recipe import load_recipe
if sys.argv[1] == "kept":
    keep_freed_memory()
clip = build_clip(load_recipe("cifar10").teacher)
images = torch.randn(128, 3, clip.preprocessing.size, clip.preprocessing.size)
steps = int(sys.argv[2])
for step in range(steps + 5):
    if step == 5:  # the first ones pay for what is made once
        started = time.perf_counter()
    clip.model.train().visual(images).square().mean().backward()
print((time.perf_counter() - started) / steps)
"""


def seconds_per_step(allocator: str, steps: int) -> float:
    """One process's mean time of a step; allocator: `default` or `kept`."""
    command = [sys.executable, "-c", STEP, allocator, str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"default": [], "kept": []}
    for _ in range(options.pairs):  # side by side, so that other programs disturb both equally
        for allocator, measured in seconds.items():
            measured.append(seconds_per_step(allocator, options.steps))
    medians = {allocator: statistics.median(measured) for allocator, measured in seconds.items()}
    print(
        json.dumps({"seconds_per_step": seconds, "kept_over_default": medians["kept"] / medians["default"]}, indent=2)
    )


if __name__ == "__main__":
    main()
