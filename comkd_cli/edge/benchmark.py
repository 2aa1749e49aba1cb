"""Times a bundle on this machine: pre-processing, and each precision on one thread and on all, batch 1 and 8.

Needs numpy and Pillow, and a classifier; it becomes a part of every bundle's predict.py.
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from comkd_cli.edge.images import ImageSource, load_prepared, open_image
from comkd_cli.edge.machine import cpu_name, peak_bytes, usable_cores, versions
from comkd_cli.edge.manifest import BundleProblem, read_manifest, read_preprocessing

BATCHES = (1, 8)
WARM_UP = 3
LEAST_RUNS, MOST_RUNS = 10, 500
ROW_SECONDS = 2.0
PICTURE_SIZE = (1280, 960)


class TimedClassifier(Protocol):
    """A classifier of prepared images."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (batch, classes) of prepared images, float32 (batch, 3, size, size)."""
        ...


class OpenTimed(Protocol):
    """What is needed of edge.classifier.Classifier, which imports this module. It is pickled by its name."""

    def __call__(self, bundle: Path, threads: int | None = None, precision: str | None = None) -> TimedClassifier:
        """The classifier of a bundle. Raises BundleProblem."""
        ...


@dataclass(frozen=True)
class Times:
    """The milliseconds of repeated runs."""

    median_ms: float
    p95_ms: float
    """95 of 100 runs took at most this long; of fewer than 20 runs, the slowest."""
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """seconds: of each run, at least one."""
        ranked = sorted(1e3 * value for value in seconds)
        return cls(statistics.median(ranked), ranked[(95 * len(ranked) + 99) // 100 - 1], len(ranked))


@dataclass(frozen=True)
class GraphRow:
    """A precision's classifier at one number of threads and one size of batch."""

    precision: str
    threads: int
    batch: int
    times: Times
    """Of a batch, without pre-processing."""
    peak_bytes: int | None
    """Peak resident memory of the process, which ran only this row; None if the system does not tell."""

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return 1e3 * self.batch / self.times.median_ms


@dataclass(frozen=True)
class Benchmark:
    """The figures of a bundle on this machine."""

    cpu: str
    cores: int
    """Those that this process may use."""
    image: str
    """The image that was prepared."""
    preprocessing: Times
    """Of one image from its file to the tensor, on one thread."""
    rows: Sequence[GraphRow]

    def document(self) -> dict[str, Any]:
        """As plain data."""
        rows = []
        for row in self.rows:
            plain = asdict(row)
            times = plain.pop("times")
            rows.append({**plain, **times, "images_per_second": row.images_per_second})
        return {
            "cpu": self.cpu,
            "cores": self.cores,
            "versions": versions(),
            "preprocessing": {"image": self.image, **asdict(self.preprocessing)},
            "rows": rows,
        }

    def text(self) -> str:
        """A table."""
        pre = self.preprocessing
        lines = [
            f"{self.cpu}, {self.cores} core{'' if self.cores == 1 else 's'}",
            f"pre-processing of {self.image}: median {pre.median_ms:.2f} ms, p95 {pre.p95_ms:.2f} ms",
            f"{'graph':10}{'threads':>8}{'batch':>7}{'median ms':>11}{'p95 ms':>9}{'images/s':>10}{'peak MiB':>10}",
        ]
        for row in self.rows:
            peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
            lines.append(
                f"{row.precision:10}{row.threads:8}{row.batch:7}{row.times.median_ms:11.2f}{row.times.p95_ms:9.2f}"
                f"{row.images_per_second:10.1f}{peak:>10}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class BenchmarkJob:
    """What is timed."""

    bundle: Path
    precision: str | None = None
    """None: each of the bundle."""
    image: str | None = None
    """The image to prepare; None makes a JPEG of PICTURE_SIZE."""
    seconds: float = ROW_SECONDS
    """How long each row may run after LEAST_RUNS."""


def run_benchmark(
    job: BenchmarkJob,
    open_classifier: OpenTimed,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Benchmark:
    """Time a bundle on this machine, row by row.

    Each row has a process of its own, since a process never lowers its peak memory. report: receives the number of
    finished rows and their total. Raises BundleProblem, also for a graph that ends its process, and UnreadableImage.
    """
    manifest = read_manifest(job.bundle)
    preprocessing = read_preprocessing(job.bundle, manifest)
    cores = usable_cores()
    precisions = [job.precision] if job.precision else list(manifest["precisions"])
    cells = [(p, threads, batch) for p in precisions for threads in sorted({1, cores}) for batch in BATCHES]
    name, picture = _picture(job.image)
    prepared = timed(lambda: load_prepared(picture, preprocessing), job.seconds)
    rows = []
    for precision, threads, batch in cells:
        rows.append(_measured(_Cell(job, precision, threads, batch, preprocessing.size), open_classifier))
        report(len(rows), len(cells))
    return Benchmark(cpu_name(), cores, name, Times.of(prepared), rows)


def timed(
    run: Callable[[], object], most_seconds: float, least: int = LEAST_RUNS, most: int = MOST_RUNS
) -> list[float]:
    """The seconds of each of at least `least` runs and at most `most`, after WARM_UP others."""
    for _ in range(WARM_UP):
        run()
    seconds: list[float] = []
    while len(seconds) < least or (sum(seconds) < most_seconds and len(seconds) < most):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class _Cell:
    """A row to measure."""

    job: BenchmarkJob
    precision: str
    threads: int
    batch: int
    size: int


def _measured(cell: _Cell, open_classifier: OpenTimed) -> GraphRow:
    """Measure a row in a process of its own. Raises BundleProblem."""
    context = multiprocessing.get_context("spawn")  # a fork would start with this process's memory
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(cell, open_classifier, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = None
    except KeyboardInterrupt:
        process.kill()
        raise
    process.join()
    if isinstance(answer, GraphRow):
        return answer
    if isinstance(answer, BundleProblem):
        raise answer
    row = f"{cell.precision}, threads: {cell.threads}, batch: {cell.batch}"
    raise BundleProblem(
        f"could not be timed ({row}): its process ended with exit status {process.exitcode}", path=cell.job.bundle
    )


def _measure(cell: _Cell, open_classifier: OpenTimed, answers: Connection) -> None:
    """The side of the child process: sends a GraphRow, or a BundleProblem."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both processes; the parent stops this one
    try:
        classifier = open_classifier(cell.job.bundle, threads=cell.threads, precision=cell.precision)
        images = np.random.default_rng(0).standard_normal((cell.batch, 3, cell.size, cell.size), dtype=np.float32)
        times = Times.of(timed(lambda: classifier.logits(images), cell.job.seconds))
        answers.send(GraphRow(cell.precision, cell.threads, cell.batch, times, peak_bytes()))
    except BundleProblem as error:
        answers.send(error)


def _picture(given: str | None) -> tuple[str, ImageSource]:
    """The name and the content of the image that is prepared. Raises UnreadableImage."""
    if given is not None:
        rgb = open_image(given)
        return f"{given} ({rgb.width} x {rgb.height} pixels)", Path(given).read_bytes()
    width, height = PICTURE_SIZE
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(PICTURE_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return f"a JPEG of {width} x {height} pixels", file.getvalue()
