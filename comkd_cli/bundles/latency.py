"""How fast a student answers and how much memory it takes, in PyTorch and in onnxruntime, side by side.

    python -m comkd_cli.bundles.latency WHAT PATH THREADS SIZE OPTIMIZATION INPUTS.npz MOST_SECONDS

WHAT is `pytorch` (PATH a student.pt) or `onnxruntime` (PATH a graph). Each measurement is a process of its own,
since memory that a process once took stays its peak; prints {"seconds": [...], "peak_bytes": ...}.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.errors import ExportError
from comkd_cli.runtime.ranks import usable_cores

ROUNDS = 3
WARM_UP = 3
MOST_SECONDS = 4.0
MOST_RUNS = 200
LEAST_RUNS = 5
STEADY_SPREAD = 1.25


@dataclass(frozen=True)
class Contender:
    """One way to run the student on one image."""

    name: str
    """`pytorch`, or a precision."""
    path: Path
    optimization: str = "all"


@dataclass(frozen=True)
class Measured:
    """One way at one number of threads, batch 1."""

    name: str
    threads: int
    seconds: float
    """Median over all rounds."""
    speed_up: float
    """PyTorch's seconds over these, at the same number of threads."""
    peak_bytes: int
    """Resident memory of the whole process at its highest."""
    memory_share: float
    """Of PyTorch's peak."""
    spread: float = 1.0
    """The slowest round's median over the fastest one's: far from 1 where other programs ran at the same time."""


def measure_latency(
    student: Path,
    graphs: list[Contender],
    size: int,
    extra: Mapping[str, np.ndarray],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """Latency and memory of eager fp32 PyTorch and of each graph, with one thread and with all.

    The contenders take turns, so that all meet the same neighbours on the machine. Raises ExportError where
    one can't be run.
    """
    contenders = [Contender("pytorch", student), *graphs]
    counts = sorted({1, usable_cores()})
    found = _in_turns(contenders, counts, size, extra, MOST_SECONDS, on_step)
    medians = {key: statistics.median(s for entry in runs for s in entry["seconds"]) for key, runs in found.items()}
    rounds = {key: [statistics.median(entry["seconds"]) for entry in runs] for key, runs in found.items()}
    peaks = {key: max(int(entry["peak_bytes"]) for entry in runs) for key, runs in found.items()}
    return [
        Measured(
            name=name,
            threads=threads,
            seconds=medians[name, threads],
            speed_up=medians["pytorch", threads] / medians[name, threads],
            peak_bytes=peaks[name, threads],
            memory_share=peaks[name, threads] / peaks["pytorch", threads],
            spread=max(rounds[name, threads]) / min(rounds[name, threads]),
        )
        for name, threads in found
    ]


def disturbance(latency: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence where the rounds of a measurement differ so much that its figures are not the machine's own."""
    worst = max(latency, key=lambda entry: float(entry["spread"]), default=None)
    if worst is None or worst["spread"] <= STEADY_SPREAD:
        return None
    return (
        f"The rounds differ by up to {worst['spread']:.1f} times ({worst['name']}, threads: {worst['threads']}): other "
        "programs were running. Measure again on an idle machine."
    )


def single_thread_seconds(graphs: list[Contender], size: int, extra: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The median seconds of one image on one thread, by name, measured in turns. Raises ExportError."""
    found = _in_turns(graphs, [1], size, extra, most_seconds=1.0)
    return {name: statistics.median(s for entry in runs for s in entry["seconds"]) for (name, _), runs in found.items()}


def _in_turns(
    contenders: list[Contender],
    thread_counts: list[int],
    size: int,
    extra: Mapping[str, np.ndarray],
    most_seconds: float,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What each round measured, by a contender's name and the number of threads."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    turns = [(threads, contender) for _ in range(ROUNDS) for threads in thread_counts for contender in contenders]
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs.npz")
        np.savez(inputs, **extra)  # type: ignore[arg-type] # numpy types its own keywords only
        for turn, (threads, contender) in enumerate(turns):
            measured = _measure(contender, threads, size, inputs, most_seconds)
            found.setdefault((contender.name, threads), []).append(measured)
            on_step(turn + 1, len(turns))
    return found


def _measure(contender: Contender, threads: int, size: int, inputs: Path, most_seconds: float) -> dict[str, Any]:
    what = "pytorch" if contender.name == "pytorch" else "onnxruntime"
    arguments = [
        what,
        str(contender.path),
        str(threads),
        str(size),
        contender.optimization,
        str(inputs),
        str(most_seconds),
    ]
    command = [sys.executable, "-m", "comkd_cli.bundles.latency", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if finished.returncode:
        said = finished.stderr.strip().splitlines()
        raise ExportError(f"{contender.path.name}: the benchmark failed: {said[-1] if said else 'no message'}")
    measured: dict[str, Any] = json.loads(finished.stdout)
    return measured


def _timed(run: Callable[[], object], most_seconds: float) -> list[float]:
    for _ in range(WARM_UP):
        run()
    seconds: list[float] = []
    while len(seconds) < LEAST_RUNS or (sum(seconds) < most_seconds and len(seconds) < MOST_RUNS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's own getrusage counts what the parent had at the fork, too
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(what: str, path: str, threads: str, size: str, optimization: str, inputs: str, most_seconds: str) -> None:
    """The child's side."""
    image = np.random.default_rng(0).standard_normal((1, 3, int(size), int(size)), dtype=np.float32)
    if what == "pytorch":
        import torch

        from comkd_cli.models.checkpoints import load_student

        torch.set_num_threads(int(threads))
        student, _ = load_student(Path(path))
        tensor = torch.from_numpy(image)
        with torch.inference_mode():
            seconds = _timed(lambda: student(tensor).logits, float(most_seconds))
    else:
        from comkd_cli.edge.classifier import start_session

        session = start_session(Path(path).read_bytes(), int(threads), optimization)
        first = session.get_inputs()[0].name
        with np.load(inputs) as arrays:
            given = {first: image, **{name: arrays[name] for name in arrays.files}}
        seconds = _timed(lambda: session.run(None, given), float(most_seconds))
    print(json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
