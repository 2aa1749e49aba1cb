"""Runs blocks of inputs in processes that may die, hang or be refused memory without ending the run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.hostile.guard import STOP_SECONDS, Guard, Outcome
from benchmarks.hostile.kinds import KINDS, cycle, generator, prepare

CONTEXT = multiprocessing.get_context("fork")  # so that a process that died is replaced within milliseconds
MEMORY_FILE_SYSTEM = Path("/dev/shm")
START_SECONDS = 60.0


@dataclass(frozen=True)
class Finding:
    """An input that did what no input should."""

    kind: str
    """Of the input."""
    number: int
    outcome: str
    detail: str


@dataclass
class Tally:
    """What became of the inputs of each kind."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    slowest_seconds: dict[str, float] = field(default_factory=dict)
    most_bytes: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, number: int, outcome: Outcome) -> None:
        """Count one outcome."""
        self.outcomes[name][outcome.kind] += 1
        self.slowest_seconds[name] = max(self.slowest_seconds.get(name, 0.0), outcome.seconds)
        self.most_bytes[name] = max(self.most_bytes.get(name, 0), outcome.grown_bytes)
        if outcome.is_finding:
            self.findings.append(Finding(name, number, outcome.kind, outcome.detail))

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "outcomes": {name: dict(counts) for name, counts in sorted(self.outcomes.items())},
            "slowest_seconds": {name: round(value, 3) for name, value in sorted(self.slowest_seconds.items())},
            "most_mebibytes": {name: round(value / 2**20, 1) for name, value in sorted(self.most_bytes.items())},
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Block:
    """Consecutive inputs."""

    seed: int
    names: Sequence[str]
    """The kinds."""
    first: int
    inputs: int
    jobs: int

    def run(self) -> Tally:
        """Try every input, in `jobs` processes."""
        prepare(self.names)
        tally, start = Tally(), time.monotonic()
        last = self.first + self.inputs
        workers = [_Worker(self, list(range(self.first + job, last, self.jobs))) for job in range(self.jobs)]
        while running := [worker for worker in workers if not worker.is_done]:
            for worker in running:
                for name, number, outcome in worker.outcomes():
                    tally.add(name, number, outcome)
        tally.seconds = time.monotonic() - start
        tally.findings.sort(key=lambda finding: finding.number)
        return tally

    def name_of(self, number: int) -> str:
        """The kind of an input."""
        names = cycle(self.names)
        return names[number % len(names)]


class _Worker:
    """A process that tries its inputs in turn; a new one continues after an input that it does not survive."""

    def __init__(self, block: Block, numbers: list[int]) -> None:
        self._block, self._left = block, numbers
        self._start()

    @property
    def is_done(self) -> bool:
        return not self._left

    def outcomes(self) -> Iterator[tuple[str, int, Outcome]]:
        """The outcomes since the last call; waits for one for a short time."""
        if self._receiver.poll(0.05):
            try:
                outcome = self._receiver.recv()
            except EOFError:
                self._process.join()
                yield self._lost(Outcome("crash", f"the process ended with {self._process.exitcode}"))
                return
            number = self._left.pop(0)
            self._since, self._limit = time.monotonic(), STOP_SECONDS
            yield self._block.name_of(number), number, outcome
            if self.is_done:
                self._end()
        elif time.monotonic() - self._since > self._limit:
            self._process.kill()
            yield self._lost(Outcome("hang", f"no answer within {self._limit:g} seconds"))

    def _lost(self, outcome: Outcome) -> tuple[str, int, Outcome]:
        number = self._left.pop(0)
        self._end()
        if self._left:
            self._start()
        return self._block.name_of(number), number, outcome

    def _start(self) -> None:
        home = MEMORY_FILE_SYSTEM if MEMORY_FILE_SYSTEM.is_dir() else None  # where fsync costs nothing
        self._folder = Path(tempfile.mkdtemp(prefix="comkd-hostile-", dir=home))
        self._receiver, sender = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_work, args=(self._block, self._left, self._folder, sender), daemon=True)
        self._process.start()
        sender.close()
        self._since, self._limit = time.monotonic(), START_SECONDS

    def _end(self) -> None:
        self._process.join()
        self._receiver.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _work(block: Block, numbers: Sequence[int], home: Path, sender: Connection) -> None:
    """The process's side: try each input, and send its outcome."""
    for name in ("case", "temporary"):
        (home / name).mkdir()
    tempfile.tempdir = str(home / "temporary")
    case = home / "case"
    os.chdir(case)  # payloads write their canary into the current directory
    with Path(os.devnull).open("w") as nowhere:  # what C libraries print
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    guard = Guard(case, case / "CANARY")
    for number in numbers:
        sender.send(try_input(guard, case, block.seed, block.name_of(number), number))


def try_input(guard: Guard, case: Path, seed: int, name: str, number: int) -> Outcome:
    """One input, in the empty folder `case`."""
    read, _ = KINDS[name]
    random = generator(seed, name, number)
    try:
        return guard.attempt(lambda: read(random, case))
    finally:
        for entry in case.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
