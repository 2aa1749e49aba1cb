"""Rates, peak memory and arithmetic of a function on a device, and a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense products of bf16 with sums in fp32, in TFLOP/s, from NVIDIA's data sheets; the first name that is part of the
# card's own counts.
BF16_PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
MOST_STEPS = 1000


@dataclass
class Budget:
    """The time of the whole benchmark; what would begin after its end is left out and listed."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    left_out: list[str] = field(default_factory=list)

    def allows(self, case: str, seconds: float) -> bool:
        """Whether a case that takes about so long may still begin."""
        allowed = time.monotonic() - self.started + seconds <= self.seconds
        if not allowed:
            self.left_out.append(case)
        return allowed


@dataclass(frozen=True)
class Meter:
    """Measures functions on a device."""

    device: torch.device
    seconds: float
    """Of each measurement."""

    def wait(self) -> None:
        """Wait until a GPU has finished its queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rate(self, step: Callable[[], object], images: int) -> dict[str, float] | None:
        """Images per second of a function that works on so many, and on a GPU its peak memory; None without memory."""
        try:
            step()  # allocates and compiles
            step()
            self.wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            once = self._seconds(step, 1)
            count = max(1, min(MOST_STEPS, int(self.seconds / once)))
            found = {"images_per_second": count * images / self._seconds(step, count)}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        if self.device.type == "cuda":
            found["peak_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return found

    def _seconds(self, step: Callable[[], object], count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            step()
        self.wait()
        return time.perf_counter() - started

    def share_of_peak(self, flops_per_image: float, images_per_second: float) -> float | None:
        """Of the card's dense bf16 rate; None for a card without a known one."""
        peak = bf16_peak(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return None if peak is None else flops_per_image * images_per_second / (peak * 1e12)


def bf16_peak(card: str) -> float | None:
    """TFLOP/s of a card by its name; None where it is not in the table."""
    return next((peak for name, peak in BF16_PEAKS.items() if name in card), None)


def flops(step: Callable[[], object]) -> int:
    """Floating point operations of the products and convolutions of a function, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
