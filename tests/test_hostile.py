"""The harness of hostile inputs: that it notices what it should, and a slice of its inputs against every reader."""

import json
import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.hostile import __main__ as command
from benchmarks.hostile import guard, kinds, running
from benchmarks.hostile.running import Block
from comkd_cli.errors import DataError

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the harness reads /proc"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def refuse(_random: Random, _folder: Path) -> None:
    raise DataError("is hostile")


def accept(_random: Random, _folder: Path) -> None:
    pass


def fail(_random: Random, _folder: Path) -> None:
    raise IndexError


def write_outside(_random: Random, folder: Path) -> None:
    (folder.parents[1] / "outside.txt").touch()
    (folder.parents[1] / "outside.txt").unlink()


def write_inside(_random: Random, folder: Path) -> None:
    (folder / "inside.txt").touch()


def start(_random: Random, _folder: Path) -> None:
    os.system("true")


def connect(_random: Random, _folder: Path) -> None:
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))


def unpickle(_random: Random, _folder: Path) -> None:
    pickle.loads(b"cbuiltins\nopen\n(S'CANARY'\nS'w'\ntR.")


def grow(_random: Random, _folder: Path) -> None:
    # Not from the heap, where memory that earlier tests freed may serve.
    with mmap.mmap(-1, 3 * guard.MOST_BYTES // 2) as memory:
        memory[:: mmap.PAGESIZE] = b"x" * (len(memory) // mmap.PAGESIZE)


def refused_memory(_random: Random, _folder: Path) -> None:
    try:
        bytearray(2 * guard.STOP_BYTES)
    except MemoryError:
        raise DataError("too large") from None


def compute(_random: Random, _folder: Path) -> None:
    while True:
        pass


def hang(_random: Random, _folder: Path) -> None:
    time.sleep(60)


def crash(_random: Random, _folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        (accept, "read"),
        (refuse, "refused"),
        (write_inside, "read"),
        (refused_memory, "refused"),
        (fail, "traceback"),
        (write_outside, "wrote"),
        (start, "executed"),
        (unpickle, "executed"),
        (connect, "connected"),
        (grow, "memory"),
        (compute, "slow"),
        (hang, "hang"),
        (crash, "crash"),
    ],
)
def test_each_outcome_is_noticed_and_the_run_continues(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[..., None], outcome: str
) -> None:
    monkeypatch.setattr(guard, "SECONDS", 0.5 if outcome in ("slow", "hang") else 20.0)
    monkeypatch.setattr(guard, "MOST_BYTES", 2**26)
    monkeypatch.setattr(guard, "STOP_BYTES", 2**28)
    monkeypatch.setattr(running, "STOP_SECONDS", 20.0)
    monkeypatch.setattr(running, "START_SECONDS", 4.0 if outcome == "hang" else 20.0)
    monkeypatch.setitem(kinds.KINDS, "tested", (kind, 1))
    monkeypatch.setitem(kinds.KINDS, "accepted", (accept, 1))
    names = ["tested", "accepted"]
    block = Block(1, names, 0, 2, 1)
    tally = block.run()
    assert dict(tally.outcomes["tested"]) == {outcome: 1}
    assert dict(tally.outcomes["accepted"]) == {"read": 1}
    assert [finding.kind for finding in tally.findings] == ([] if outcome in ("read", "refused") else ["tested"])


def test_an_input_is_determined_by_seed_kind_and_number_and_a_log_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing_sometimes(random: Random, _folder: Path) -> None:
        if random.random() < 0.3:
            raise IndexError(str(random.random()))

    monkeypatch.setattr(command, "BLOCK_INPUTS", 10)
    monkeypatch.setitem(kinds.KINDS, "graph", (failing_sometimes, 1))

    def run(*arguments: str) -> dict[str, Any]:
        status = command.main(["--seed", "5", "--kinds", "graph", *arguments])
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert status == bool(document["findings"])
        return document

    whole = run("--inputs", "30", "--jobs", "2", "--log", str(tmp_path / "log.jsonl"))
    assert whole["inputs"] == sum(whole["outcomes"].values()) == 30
    assert 0 < whole["outcomes"]["traceback"] < 30
    finding = whole["findings"][-1]
    (again,) = run("--inputs", "1", "--first", str(finding["number"]), "--jobs", "1")["findings"]
    assert again["detail"].splitlines()[-1] == finding["detail"].splitlines()[-1]
    monkeypatch.setitem(kinds.KINDS, "graph", (fail, 1))  # what the log has is not run again
    assert run("--inputs", "30", "--log", str(tmp_path / "log.jsonl"))["findings"] == whole["findings"]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of libraries that make the inputs, such as a name that is twice in an archive
def test_two_thousand_hostile_inputs_are_read_or_refused() -> None:
    tally = Block(2026, list(kinds.KINDS), 0, 2000, min(2, os.cpu_count() or 1)).run()
    assert not tally.findings, tally.findings[:3]
    assert set(tally.outcomes) == set(kinds.KINDS)
    # Inputs that are all read, or all refused, would test little. A damaged results.json is moved aside, and a damaged
    # curve is none; most hostile settings, labels and prompts are refused.
    assert {name for name, counts in tally.outcomes.items() if not counts["refused"]} <= {"results", "curve"}
    assert {name for name, counts in tally.outcomes.items() if not counts["read"]} <= {"setting", "labels", "prompts"}
