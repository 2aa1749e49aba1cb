"""Plans cases from a seed, runs them, and counts kills and findings."""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kills.kinds import ARCHIVE, BUNDLE, KINDS, Kind, eurosat, start_with, write_inputs
from benchmarks.kills.processes import Ended, Kill, Runner, Usual, revision
from benchmarks.kills.states import State, differences, part_of, state_of
from comkd_cli.edge.machine import cpu_name
from tests.hub import hub

MOST_KILLS = 4  # of a case
MOST_DELAY_SECONDS = 0.003
MADE_BY = {"made": ("distill", "work"), "scored": ("evaluate", "work"), "bundle": ("export", BUNDLE)}


@dataclass(frozen=True)
class Case:
    """A command and its kills."""

    number: int
    kind: str
    kills: tuple[Kill, ...]


@dataclass
class Tally:
    """What has been found so far."""

    kills: Counter[str] = field(default_factory=Counter)
    """By kind."""
    modes: Counter[str] = field(default_factory=Counter)
    phases: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind and the last file operation that began before the kill."""
    cases: Counter[str] = field(default_factory=Counter)
    reruns: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)


class Failure(Exception):
    """A case that did not end as an undisturbed run."""


def planned(seed: int, number: int, kinds: Sequence[str]) -> Case:
    """The case of a number, which depends on nothing else."""
    draw = random.Random(f"{seed}/{number}")
    (kind,) = draw.choices(kinds, [KINDS[name].share for name in kinds])
    count = draw.randint(1, MOST_KILLS)
    modes = ("instant", "before", "during")
    kills = [Kill(draw.choice(modes), draw.random(), draw.uniform(0, MOST_DELAY_SECONDS)) for _ in range(count)]
    return Case(number, kind, tuple(kills))


class Harness:
    """Runs cases in a folder of its own, which it fills with what they need."""

    def __init__(self, root: Path, hub_address: str) -> None:
        self._root = root
        self._runner = Runner(root, hub_address)
        self._usual: dict[str, Usual] = {}
        self._expected: dict[str, State] = {}
        self.tally = Tally()
        write_inputs(root)
        (root / "exported").mkdir()

    def operations(self, name: str) -> tuple[str, ...]:
        """The file operations of an undisturbed run."""
        if name not in self._usual:
            self._observe(name)
        return self._usual[name].operations

    def _make(self, name: str) -> None:
        """What commands need, see Kind."""
        if (self._root / name).exists():
            return
        made_by, source = MADE_BY[name]
        start_with(KINDS[made_by], self._root)
        _check(self._runner.run(KINDS[made_by]))
        shutil.copytree(self._root / source, self._root / name)
        # The digests of the images are those of a place and a time; each run makes them itself.
        (self._root / name / "image_digests.sqlite").unlink(missing_ok=True)

    def _observe(self, name: str) -> None:
        """Two undisturbed runs, which must leave the same."""
        for needed in KINDS[name].needs:
            self._make(needed)
        states = []
        for _ in range(2):
            start_with(KINDS[name], self._root)
            ended = self._runner.run(KINDS[name])
            _check(ended)
            states.append(self._state())
        if lines := differences(*states):
            raise Failure(f"{name}: two undisturbed runs differ: {'; '.join(lines)}")
        self._usual[name], self._expected[name] = Usual(ended.seconds, ended.operations), states[0]

    def _state(self) -> State:
        return state_of(self._root, ("work", "temporary", "hub"))

    def run(self, case: Case, seed: int) -> None:
        """Run a case, and note what it found."""
        self.operations(case.kind)
        kind, landed = KINDS[case.kind], []
        start_with(kind, self._root)
        self.tally.cases[case.kind] += 1
        try:
            for kill in (*case.kills, None):
                ended = self._runner.run(kind, kill, self._usual[case.kind])
                if not ended.killed:
                    break
                landed.append(self._note_kill(case, kill, ended))
                self._check_whole(kind, self._expected[case.kind])
            self._check_end(case, ended)
        except Failure as failure:
            command = f"--seed {seed} --first {case.number} --kills 1"
            finding = {"case": asdict(case), "command": command, "killed": landed, "found": str(failure)}
            self.tally.findings.append(finding)
            print(f"FOUND {json.dumps(finding)}", file=sys.stderr, flush=True)

    def _note_kill(self, case: Case, kill: Kill | None, ended: Ended) -> str:
        assert kill is not None  # nothing else ends a run by SIGKILL
        phase = _phase(ended.operations)
        self.tally.kills[case.kind] += 1
        self.tally.modes[kill.mode] += 1
        self.tally.phases.setdefault(case.kind, Counter())[phase] += 1
        self.tally.reruns += 1
        return f"{kill.mode} after {ended.seconds:.3f} s: {phase}"

    def _check_whole(self, kind: Kind, expected: State) -> None:
        """Raise Failure if a file or folder that is replaced atomically is incomplete."""
        for name in kind.whole:
            found = part_of(state_of(self._root, ["work"]), name)
            if found and (lines := differences(found, part_of(expected, name))):
                raise Failure(f"in part after a kill: {'; '.join(lines)}")

    def _check_end(self, case: Case, ended: Ended) -> None:
        _check(ended)
        if left := self._runner.orphans():
            raise Failure(f"processes left: {'; '.join(left)}")
        if lines := differences(self._state(), self._expected[case.kind]):
            raise Failure("; ".join(lines))


def _check(ended: Ended) -> None:
    if ended.code:
        raise Failure(f"exit {ended.code}: {ended.said[-2000:]}")


def _phase(operations: Sequence[str]) -> str:
    """The last operation without what differs between runs: `rename student.pt`."""
    if not operations:
        return "before the first file operation"
    name, _, path = operations[-1].partition(" ")
    file = Path(path).name
    file = re.sub(r"^\.(.+)\.[0-9a-z_]{8}(\.tmp)?$", r"\1 (temporary)", file)
    return f"{name} {re.sub(r'[0-9a-f]{12,}', '*', file)}"


def cases(seed: int, first: int, kinds: Sequence[str]) -> Iterator[Case]:
    """All cases from a number on."""
    number = first
    while True:
        yield planned(seed, number, kinds)
        number += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases until enough kills have landed; the exit code is 1 where something was found."""
    from benchmarks.kills import __main__ as page

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills",
        description=page.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, help="also write the JSON document there, after every case")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="comkd-kills-"))).resolve()
        address, handler = stack.enter_context(hub())
        handler.files[ARCHIVE] = eurosat()
        harness = Harness(root, address)
        for case in cases(options.seed, options.first, options.kinds):
            harness.run(case, options.seed)
            summary = _summary(options, harness.tally, case.number + 1, time.monotonic() - started)
            if options.out is not None:
                options.out.write_text(summary)
            print(f"{harness.tally.kills.total()} kills, next case {case.number + 1}", file=sys.stderr, flush=True)
            if harness.tally.kills.total() >= options.kills:
                break
    print(summary)
    return int(bool(harness.tally.findings))


def _summary(options: argparse.Namespace, tally: Tally, following: int, seconds: float) -> str:
    import torch

    document = {
        "seed": options.seed,
        "cases": f"{options.first} to {following - 1}",
        "revision": revision(),
        "machine": cpu_name(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "kills": tally.kills.total(),
        "kills_by_kind": dict(tally.kills),
        "kills_by_mode": dict(tally.modes),
        "kills_by_phase": {name: dict(counts.most_common()) for name, counts in tally.phases.items()},
        "cases_by_kind": dict(tally.cases),
        "reruns": tally.reruns,
        "findings": tally.findings,
    }
    return json.dumps(document, indent=1)
