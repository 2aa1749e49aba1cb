"""What an exported precision must keep of the student. Imports neither numpy nor onnx: the command line uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """The limits that a precision must meet to be in a bundle."""

    cosine_min: float
    """Smallest cosine similarity of an image's features with the student's."""
    agreement_min_percent: float
    """Top-1 agreement with the student."""
    top1_loss_max_points: float
    """Top-1 of the student minus top-1 of the graph, if the images have labels."""
    difference_max: float = float("inf")
    """Largest |difference| of a single feature."""


@dataclass(frozen=True)
class SpeedGate:
    """How fast a precision must be on the machine that exports it; None: no limit."""

    max_latency_ms: float | None = None
    """Milliseconds of one image on one thread, by the median."""
    min_speedup: float | None = None
    """Milliseconds of eager PyTorch in fp32 over those of the graph, both of one image on one thread."""

    @property
    def measures(self) -> bool:
        """Whether there is a limit."""
        return self.max_latency_ms is not None or self.min_speedup is not None

    def failures(self, milliseconds: float, speed_up: float) -> list[str]:
        """Each figure that misses its limit, with that limit; empty if the gate is passed."""
        missed = []
        if self.max_latency_ms is not None and not milliseconds <= self.max_latency_ms:
            missed.append(f"{milliseconds:.2f} ms for one image on one thread (limit {self.max_latency_ms:g} ms)")
        if self.min_speedup is not None and not speed_up >= self.min_speedup:
            missed.append(f"{speed_up:.2f} times as fast as PyTorch on one thread (limit {self.min_speedup:g})")
        return missed


GATES = {
    "fp32": Gate(cosine_min=0.99999, agreement_min_percent=100.0, top1_loss_max_points=0.1, difference_max=1e-4),
    "fp16": Gate(cosine_min=0.9995, agreement_min_percent=99.5, top1_loss_max_points=0.2),
    "int8": Gate(cosine_min=0.98, agreement_min_percent=98.0, top1_loss_max_points=1.0),
}
PRECISIONS = tuple(GATES)
TEXT = "text"
TEXT_LIMITS = ("cosine_min", "agreement_min_percent")
"""The limits that the gate of a text encoder has."""
TEXT_GATE = Gate(cosine_min=0.995, agreement_min_percent=99.5, top1_loss_max_points=float("inf"))
"""Of a text encoder in fewer bits, against its fp32 graph: the vectors of names, and images classified with them."""

INPUTS = ("pixels", "image")
"""Inputs of graphs that prepare their images themselves."""


def input_gate(kind: str, precision: str) -> Gate:
    """The limits of such graphs, against the graphs of the same precision with prepared images.

    pixels: the same operations on the same numbers. image: resizing in float32 moves a few levels in ten thousand to
    the next one. That must cost no more than fp16 may; if activations are rounded to eight bits, it moves some of
    them by a whole step, and may cost a quarter of what int8 may.
    """
    if kind == "pixels":
        return Gate(cosine_min=0.99999, agreement_min_percent=99.5, top1_loss_max_points=0.0, difference_max=1e-4)
    return Gate(
        cosine_min=0.995 if precision == "int8" else 0.9995, agreement_min_percent=99.5, top1_loss_max_points=0.0
    )


def in_order(precisions: Sequence[str]) -> tuple[str, ...]:
    """Each precision once, in the order of PRECISIONS."""
    return tuple(precision for precision in PRECISIONS if precision in precisions)
