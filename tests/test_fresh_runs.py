"""`comkd distill --fresh` over several seeds, interrupted: the command that it prints omits no run and repeats none."""

import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from comkd_cli.cli.resuming import Choice, StoppedRun
from tests import tiny, warm


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Sets the command line of this process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda line: monkeypatch.setattr(sys, "argv", shlex.split(line))


SEEDS = [Choice(None, 1), Choice(None, 2), Choice(None, 3)]
GRID = [Choice(name, seed) for name in ("dtd", "eurosat", "ucf101") for seed in (1, 2)]


@pytest.mark.parametrize(
    ("line", "choices", "position", "in_teacher", "expected"),
    [
        ("comkd distill r.yaml --seed 1", [Choice(None, 1)], 0, False, "comkd distill r.yaml --seed 1"),
        ("comkd distill r.yaml --seed 1 --seed 2", SEEDS[:2], 1, False, "comkd distill r.yaml --seed 1 --seed 2"),
        ("comkd distill r.yaml --fresh", [Choice(None, None)], 0, False, "comkd distill r.yaml"),
        ("comkd distill r.yaml --fresh", [Choice(None, None)], 0, True, "comkd distill r.yaml --fresh"),
        (
            "comkd --debug distill r.yaml --seed 1 --seed=2 --seed 3 --fresh --set 'about=a b'",
            SEEDS,
            1,
            False,
            "comkd --debug distill --seed=2 r.yaml --set 'about=a b' &&\n"
            "  comkd --debug distill --seed=3 --fresh r.yaml --set 'about=a b'",
        ),
        (
            "comkd distill r.yaml --seed 1 --seed 2 --seed 3 --fresh",
            SEEDS,
            1,
            True,
            "comkd distill --seed=2 --seed=3 --fresh r.yaml",
        ),
        ("comkd distill r.yaml --seed 1 --seed 2 --seed 3 --fresh", SEEDS, 2, False, "comkd distill --seed=3 r.yaml"),
        (
            "comkd distill r.yaml --fresh --all --seed 1 --seed 2 --runs x",
            GRID,
            0,
            False,
            "comkd distill --dataset=dtd --seed=1 r.yaml --runs x &&\n"
            "  comkd distill --dataset=dtd --seed=2 --fresh r.yaml --runs x &&\n"
            "  comkd distill --dataset=eurosat --dataset=ucf101 --seed=1 --seed=2 --fresh r.yaml --runs x",
        ),
        (
            "comkd distill --fresh --dataset=dtd --dataset eurosat --dataset ucf101 -- r.yaml",
            [Choice(name, None) for name in ("dtd", "eurosat", "ucf101")],
            0,
            False,
            "comkd distill --dataset=dtd -- r.yaml &&\n"
            "  comkd distill --dataset=eurosat --dataset=ucf101 --fresh -- r.yaml",
        ),
    ],
)
def test_the_printed_command_resumes_the_stopped_run_and_starts_the_others(  # type: ignore[no-untyped-def]
    typed, line: str, choices: list[Choice], position: int, in_teacher: bool, expected: str
) -> None:
    typed(line)
    stopped = StoppedRun(choices, position, fresh="--fresh" in line)
    assert (stopped.resume_teacher if in_teacher else stopped.resume_student) == expected


@pytest.mark.parametrize(
    ("line", "choices", "expected"),
    [
        ("comkd distill r.yaml --seed 2 --fresh", [Choice(None, 2)], "comkd distill r.yaml --seed 2"),
        (
            "comkd distill r.yaml --all --seed=1 --seed 2 --runs x",
            [Choice("dtd", 1), Choice("dtd", 2)],
            "comkd distill --dataset=dtd --seed=2 r.yaml --runs x",
        ),
    ],
)
def test_the_command_of_one_run_alone_names_no_other(  # type: ignore[no-untyped-def]
    typed, line: str, choices: list[Choice], expected: str
) -> None:
    typed(line)
    assert StoppedRun(choices, len(choices) - 1, fresh="--fresh" in line).alone == expected


def wait_for(process: warm.Process, file: Path, lines: int) -> None:
    deadline = time.monotonic() + 200
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weights(runs: Path, seed: int) -> dict[str, torch.Tensor]:
    path = runs / f"tiny/digits/seed{seed}/student.pt"
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_fresh_command_ends_with_the_same_students(tmp_path: Path) -> None:
    """Seed 2 is interrupted: seed 1 stays as it is, 2 is resumed, and 3, finished before, starts from scratch."""
    with (tmp_path / "tiny.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(tiny.recipe(optim={**tiny.OPTIM, "epochs": 5}), stream)

    def start(line: str) -> warm.Process:
        program, *arguments = shlex.split(line)
        assert program == "comkd"
        return warm.Process(*arguments, cwd=tmp_path)

    def finish(line: str) -> str:
        said = ""
        for command in line.split("&&"):  # as a shell runs them
            ended = start(command)
            said += ended.communicate()[1]
            assert ended.returncode == 0, said
        return said

    finish("comkd distill tiny.yaml --runs whole --seed 1 --seed 2 --seed 3")
    finish("comkd distill tiny.yaml --runs runs --seed 3")
    home = tmp_path / "runs/tiny/digits"
    made_before = (home / "seed3/student.pt").stat().st_mtime_ns
    started = start("comkd distill tiny.yaml --runs runs --seed 1 --seed 2 --seed 3 --fresh")
    wait_for(started, home / "seed2/metrics.jsonl", 1)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=100)
    assert started.returncode == 130
    line = said[said.index("  comkd distill") :]
    assert line.split("&&") == [
        "  comkd distill --seed=2 tiny.yaml --runs runs ",
        "\n  comkd distill --seed=3 --fresh tiny.yaml --runs runs\n",
    ]
    first = (home / "seed1/student.pt").stat().st_mtime_ns

    resumed = finish(line)
    assert resumed.count("from epoch") == 1
    assert (home / "seed1/student.pt").stat().st_mtime_ns == first
    assert (home / "seed3/student.pt").stat().st_mtime_ns > made_before
    for seed in (1, 2, 3):
        expected, found = weights(tmp_path / "whole", seed), weights(tmp_path / "runs", seed)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
