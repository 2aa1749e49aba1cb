"""The fixtures and the summary of tests/conftest.py where pytest-xdist runs the tests in two workers."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

INTERRUPTED = """
import os, signal, threading, time
import pytest

def test_sigint_reaches_the_main_thread():
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
"""
SKIPPED = """
import os
import pytest

@pytest.mark.needs_tool("no-such-program")
def test_with_a_tool():
    pass

def test_in_a_worker():
    assert os.environ["PYTEST_XDIST_WORKER"]
    pytest.skip("reason of " + __name__)
"""


LEAVES = """
import fcntl, subprocess, sys, threading, time

def test_leaves_something():
    subprocess.Popen(["sh", "-c", "sleep 6; exit"])
    subprocess.run(["sh", "-c", "sleep 7 >/dev/null 2>&1 &"])
    threading.Thread(target=time.sleep, args=(5,), name="forgotten").start()
    sys.held = open(__file__)
    fcntl.flock(sys.held, fcntl.LOCK_EX)
"""


@pytest.fixture
def done(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A run of four test files by two workers, in a process that ignores SIGINT, as a shell's background job does."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    for number in (1, 2):
        (tmp_path / f"test_interrupted_{number}.py").write_text(INTERRUPTED)
        (tmp_path / f"test_skipped_{number}.py").write_text(SKIPPED)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers =\n    needs_tool(name): programs\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "COMKD_REQUIRE_TOOLS"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )


@pytest.mark.slow
def test_workers_receive_sigint_and_their_skips_are_counted(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
    assert "2 passed, 4 skipped" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("4 tests were skipped: 2 because no-such-program is not installed; ")
    for number in (1, 2):
        assert f"1 because reason of test_skipped_{number}" in last


def test_the_files_that_are_run_first_exist(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    assert [name for name in conftest.LONGEST if not (root / name).is_file()] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it finds processes and locks in /proc")
def test_what_a_test_leaves_fails_the_run(tmp_path: Path) -> None:
    own = Path(__file__).with_name("conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(own.replace("LEFT_SECONDS = 20.0", "LEFT_SECONDS = 0.5"))
    (tmp_path / "test_leaves.py").write_text(LEAVES)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    message = next(line for line in done.stdout.splitlines() if "AssertionError" in line)
    for found in ("thread forgotten", ": sh -c sleep 6; exit", ": sleep 7", "lock "):
        assert found in message
