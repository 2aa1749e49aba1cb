"""Two real processes that exchange over gloo: slow ones are waited for, those that hang are not."""

import signal
import socket
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from comkd_cli.errors import PeerError
from comkd_cli.runtime import collectives
from tests import warm

TIMEOUT_SECONDS = 2.0
long = pytest.mark.slow  # two processes that wait for one another
PREAMBLE = f"""
import os, signal, sys, time
from datetime import timedelta
from torch import distributed
from comkd_cli.runtime import collectives
from comkd_cli.errors import DataError, PeerError

collectives.set_timeout({TIMEOUT_SECONDS} / 60)
distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
rank = distributed.get_rank()

def failure(work):
    try:
        work()
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
    return "none"
"""

Start = Callable[[str], list[warm.Process]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start two processes of one run, each with the code of the test."""
    with ExitStack() as stack:

        def launch(code: str) -> list[warm.Process]:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            (tmp_path / "code_of_a_rank.py").write_text(PREAMBLE + textwrap.dedent(code))
            shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            begun = []
            for rank in range(2):
                env = {**shared, "RANK": str(rank)}
                process = warm.Process(cwd=tmp_path, env=env, module="code_of_a_rank", package=tmp_path, digits=None)
                begun.append(stack.enter_context(process))
                stack.callback(process.kill)
            return begun

        yield launch


def answers(begun: list[warm.Process]) -> list[str]:
    ended = [process.communicate(timeout=90) for process in begun]
    assert [process.returncode for process in begun] == [0, 0], ended
    return [out.strip() for out, _ in ended]


@long
def test_slow_work_of_any_process_is_waited_for_beyond_the_timeout(start: Start) -> None:
    code = """
    def slow(of):
        if rank == of:
            time.sleep(4)
        return f"{of}"

    found = [collectives.in_turn(lambda: slow(0)), collectives.in_turn(lambda: slow(1))]
    found.append(collectives.on_every_rank(lambda: slow(1)))
    with collectives.main_first():
        found.append(slow(0))
    with collectives.without_timeout():
        slow(1)
    letters = collectives.all_gather("ab"[rank])
    print(found, collectives.all_gather_ints([rank + 7]), collectives.broadcast(rank), letters)
    collectives.destroy()
    """
    assert answers(start(code)) == ["['0', '1', '1', '0'] [[7], [8]] 0 ['a', 'b']"] * 2


@long
def test_the_main_process_is_through_a_block_before_another_enters(start: Start) -> None:
    code = """
    with collectives.main_first():
        entered = time.time()
        time.sleep(1 if rank == 0 else 0)
        left = time.time()
    times = collectives.all_gather((entered, left))
    print(times[0][1] <= times[1][0])
    collectives.destroy()
    """
    assert answers(start(code)) == ["True", "True"]


@long
def test_a_process_that_hangs_fails_the_others_within_the_timeout(start: Start) -> None:
    code = """
    collectives.barrier()
    if rank == 1:
        time.sleep(100)
    began = time.monotonic()
    print(failure(collectives.barrier), f"after {time.monotonic() - began:.0f} s")
    """
    waiting, hanging = start(code)
    said, trouble = waiting.communicate(timeout=60)
    assert hanging.poll() is None
    assert said.startswith("PeerError: another rank did not answer within 0.0333333 minutes"), trouble
    assert "collective_timeout_minutes" in said
    assert float(said.split("after ")[1].split()[0]) <= TIMEOUT_SECONDS + 3


@long
def test_a_process_that_is_stopped_within_an_unlimited_block_fails_it(start: Start) -> None:
    code = """
    def work():
        with collectives.without_timeout():
            if rank == 1:
                print("at work", flush=True)
                time.sleep(100)
    print(failure(work))
    """
    waiting, hanging = start(code)
    assert hanging.stdout is not None
    assert hanging.stdout.readline() == "at work\n"
    began = time.monotonic()
    hanging.send_signal(signal.SIGSTOP)
    said, trouble = waiting.communicate(timeout=60)
    assert said.startswith("PeerError: another rank did not answer"), trouble
    assert time.monotonic() - began < TIMEOUT_SECONDS + 8


@long
def test_a_process_that_ends_is_told_to_the_others_at_once(start: Start) -> None:
    code = """
    def work():
        with collectives.without_timeout():
            if rank == 1:
                os._exit(3)
    print(failure(work))
    """
    said, trouble = start(code)[0].communicate(timeout=60)
    assert said.startswith("PeerError: another process of this run exited"), trouble


@long
def test_an_error_of_one_process_is_raised_by_all(start: Start) -> None:
    code = """
    def work(failing):
        if rank == failing:
            raise DataError(f"no images at {failing}")

    def read(failing):
        if rank == failing:
            open("/no/such/file")

    for function in (collectives.in_turn, collectives.on_every_rank):
        for failing in (0, 1):
            print(failure(lambda: function(lambda: work(failing))))
            print(failure(lambda: function(lambda: read(failing))))
    collectives.destroy()
    """
    absent = "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'"
    told = [line for failing in (0, 1) for line in (f"DataError: no images at {failing}", absent)]
    assert [said.splitlines() for said in answers(start(code))] == [told * 2] * 2


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation", "did not answer"),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", "did not answer"),
        ("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:9", "exited"),
        ("NCCL error: remote process exited or there was a network error", "exited"),
    ],
)
def test_the_words_of_gloo_and_nccl_are_explained(said: str, told: str) -> None:
    explained = collectives.peer_error(RuntimeError(said))
    assert isinstance(explained, PeerError)
    assert told in str(explained)


@pytest.mark.parametrize("said", ["DataLoader timed out after 5 seconds", "a bug", "shape mismatch"])
def test_other_errors_are_not(said: str) -> None:
    assert collectives.peer_error(RuntimeError(said)) is None
