"""What lets two processes share the cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from comkd_cli.runtime import cores, ranks

ROOT = Path(__file__).parents[2]
LARGE = 10**12  # multiply-adds


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def with_cores(monkeypatch: pytest.MonkeyPatch, usable: int, affinity: int | None = None) -> None:
    monkeypatch.setattr(ranks, "usable_cores", lambda: usable)
    monkeypatch.setattr(ranks, "cores_of_affinity", lambda: affinity or usable)


def test_the_spin_is_bounded_and_openmp_counts_the_cores_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 4)
    assert cores.shared_settings({}).keys() == {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def test_openmp_is_given_the_cores_of_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, usable=3, affinity=64)
    assert cores.shared_settings({})["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("own", "left_alone"),
    [
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT"}),
        ({"KMP_BLOCKTIME": "200"}, {"KMP_BLOCKTIME"}),
        ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}),
        ({"OMP_NUM_THREADS": "9"}, {"OMP_NUM_THREADS"}),
    ],
)
def test_what_the_user_has_set_stays(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str], left_alone: set[str]
) -> None:
    with_cores(monkeypatch, usable=3, affinity=64)
    assert cores.shared_settings({}).keys() - cores.shared_settings(own).keys() == left_alone


def test_a_command_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, usable=3, affinity=64)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    before = dict(os.environ)
    with cores.sharing_cores():
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert dict(os.environ) == before


def test_a_thread_has_enough_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 16)
    assert [cores.step_threads(size * 10**9) for size in (0, 1, 3, 1000)] == [1, 4, 12, 16]


@pytest.mark.parametrize(("usable", "small"), [(1, 1), (2, 1), (3, 1), (6, 3)])
def test_only_a_small_step_leaves_cores_to_the_processes_that_decode(
    monkeypatch: pytest.MonkeyPatch, usable: int, small: int
) -> None:
    with_cores(monkeypatch, usable)
    assert cores.step_threads(10**9) == small
    assert cores.step_threads(LARGE) == usable


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 8)
    monkeypatch.setattr(ranks, "per_machine", lambda: 4)
    assert cores.step_threads(LARGE) == 2


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, usable=3, affinity=64)
    assert cores.chooses_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not cores.chooses_threads()
    assert cores.step_threads(1) is None
    with cores.sharing_cores():
        assert cores.step_threads(1) is None


def test_a_quota_is_not_the_users_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, usable=3, affinity=64)
    with cores.sharing_cores():
        assert cores.step_threads(LARGE) == 3
        assert cores.step_threads(1) == 1
        assert [cores.chooses_threads(device) for device in ("cpu", "cuda")] == [True, False]


def test_a_step_of_unknown_size_keeps_its_threads() -> None:
    assert cores.step_threads(None) is None


STARTED = """
import os, sys
import click
from comkd_cli.cli.app import main

@main.command("probe")
def probe():
    assert "torch" not in sys.modules
    print(os.environ.get("GOMP_SPINCOUNT"))

main.list_commands = lambda context: ["probe"]
main.get_command = lambda context, name: probe
main(["probe"])
"""


def test_a_command_has_the_settings_before_torch_is_loaded() -> None:
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert done.stdout.split() == [cores.SPIN_COUNT]
