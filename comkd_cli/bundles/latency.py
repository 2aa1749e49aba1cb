"""Latency and peak memory of a student in PyTorch and in onnxruntime, measured in alternation.

    python -m comkd_cli.bundles.latency JOB

JOB is a _Job as JSON. Each measurement is a process of its own, because a process never lowers its peak memory. It
prints {"seconds": [...], "peak_bytes": ...}.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.bundles.runner import last_line
from comkd_cli.edge.benchmark import timed
from comkd_cli.edge.machine import peak_bytes, usable_cores
from comkd_cli.errors import ExportError
from comkd_cli.files import temporary_folder

PYTORCH = "pytorch"
ROUNDS = 3
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
    """The figures of a contender at one number of threads, of one image: at a fixed batch, of its share of that."""

    name: str
    threads: int
    seconds: float
    """Median over all rounds."""
    speed_up: float
    """PyTorch's seconds divided by these, at the same number of threads."""
    peak_bytes: int
    """Peak resident memory of the whole process."""
    memory_share: float
    """As a fraction of PyTorch's peak."""
    spread: float = 1.0
    """Median of the slowest round over that of the fastest: far above 1 if other programs were running."""


@dataclass(frozen=True)
class Timing:
    """The seconds of one image, in several rounds."""

    median: float
    """Over all runs of all rounds."""
    fastest: float
    """Median of the fastest round."""
    slowest: float
    """Median of the slowest round."""

    @classmethod
    def of(cls, rounds: Sequence[Mapping[str, Any]]) -> Timing:
        """From what the processes of the rounds printed."""
        medians = [statistics.median(entry["seconds"]) for entry in rounds]
        whole = statistics.median(seconds for entry in rounds for seconds in entry["seconds"])
        return cls(whole, min(medians), max(medians))


@dataclass(frozen=True)
class _Job:
    """One measurement, in a process of its own."""

    runtime: str
    """`pytorch`, with a student.pt as the path, or `onnxruntime`, with a graph."""
    path: str
    threads: int
    size: int
    """Side of the image, in pixels."""
    optimization: str
    inputs: str
    """An .npz of the graph's other inputs."""
    most_seconds: float


def measure_latency(
    student: Path,
    graphs: list[Contender],
    size: int,
    extra: Mapping[str, np.ndarray],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """Latency and memory of eager fp32 PyTorch and of each graph, with one thread and with all cores.

    The contenders alternate, so that other load of the machine affects all of them. extra: the graphs' other inputs.
    on_step: receives the number of finished measurements and their total. Raises ExportError if one fails.
    """
    contenders = [Contender(PYTORCH, student), *graphs]
    counts = sorted({1, usable_cores()})
    rounds = _alternate(contenders, counts, size, extra, MOST_SECONDS, on_step)
    timings = {key: Timing.of(entries) for key, entries in rounds.items()}
    peaks = {key: max(int(entry["peak_bytes"]) for entry in entries) for key, entries in rounds.items()}
    return [
        Measured(
            name=name,
            threads=threads,
            seconds=timing.median,
            speed_up=timings[PYTORCH, threads].median / timing.median,
            peak_bytes=peaks[name, threads],
            memory_share=peaks[name, threads] / peaks[PYTORCH, threads],
            spread=timing.slowest / timing.fastest,
        )
        for (name, threads), timing in timings.items()
    ]


def measured_batch(manifest: Mapping[str, Any]) -> str:
    """What the milliseconds of a graph refer to, as the head of a table: an image, or its share of a fixed batch."""
    batch = manifest["batch"] or 1
    return "batch 1" if batch == 1 else f"share of batch {batch}"


def disturbance(latency: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence if the rounds of a measurement differ so much that other programs must have been running."""
    worst = max(latency, key=lambda entry: float(entry["spread"]), default=None)
    if worst is None or worst["spread"] <= STEADY_SPREAD:
        return None
    return (
        f"The rounds differ by up to {worst['spread']:.1f} times ({worst['name']}, threads: {worst['threads']}): other "
        "programs were running. Measure again on an idle machine."
    )


def single_thread_timings(graphs: list[Contender], size: int, extra: Mapping[str, np.ndarray]) -> dict[str, Timing]:
    """The seconds of one image on one thread, by name, measured in alternation. Raises ExportError."""
    rounds = _alternate(graphs, [1], size, extra, most_seconds=1.0)
    return {name: Timing.of(entries) for (name, _), entries in rounds.items()}


def _alternate(
    contenders: list[Contender],
    thread_counts: list[int],
    size: int,
    extra: Mapping[str, np.ndarray],
    most_seconds: float,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """What the process of each round printed, by the contender's name and the number of threads."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    turns = [(threads, contender) for _ in range(ROUNDS) for threads in thread_counts for contender in contenders]
    with temporary_folder() as folder:
        inputs = str(folder / "inputs.npz")
        np.savez(inputs, **extra)  # type: ignore[arg-type] # numpy types its own keywords only
        for i, (threads, contender) in enumerate(turns):
            runtime = PYTORCH if contender.name == PYTORCH else "onnxruntime"
            path, optimization = str(contender.path), contender.optimization
            measured = _measure(_Job(runtime, path, threads, size, optimization, inputs, most_seconds))
            found.setdefault((contender.name, threads), []).append(measured)
            on_step(i + 1, len(turns))
    return found


def _measure(job: _Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "comkd_cli.bundles.latency", json.dumps(asdict(job))]
    env = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if finished.returncode:
        raise ExportError(f"the benchmark failed: {last_line(finished.stderr)}", path=Path(job.path).name)
    measured: dict[str, Any] = json.loads(finished.stdout)
    return measured


def main(argument: str) -> None:
    """The side of the child process."""
    job = _Job(**json.loads(argument))
    image = np.random.default_rng(0).standard_normal((1, 3, job.size, job.size), dtype=np.float32)
    if job.runtime == PYTORCH:
        import torch

        from comkd_cli.models.checkpoints import load_student

        torch.set_num_threads(job.threads)
        student, _ = load_student(Path(job.path))
        tensor = torch.from_numpy(image)
        with torch.inference_mode():
            seconds = timed(lambda: student(tensor).logits, job.most_seconds, LEAST_RUNS, MOST_RUNS)
    else:
        from comkd_cli.edge.session import start_session

        session = start_session(Path(job.path).read_bytes(), job.threads, job.optimization)
        entry = session.get_inputs()[0]
        if isinstance(entry.shape[0], int):  # a fixed batch, of which one image's share is reported
            image = np.repeat(image, entry.shape[0], axis=0)
        with np.load(job.inputs) as arrays:
            inputs = {entry.name: image, **{name: arrays[name] for name in arrays.files}}
        whole = timed(lambda: session.run(None, inputs), job.most_seconds, LEAST_RUNS, MOST_RUNS)
        seconds = [each / len(image) for each in whole]
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1])
