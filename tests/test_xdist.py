"""The fixtures and the summary of tests/conftest.py where pytest-xdist runs the tests in two workers."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_workers_receive_sigint_and_their_skips_are_counted(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
    assert "2 passed, 4 skipped" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("4 tests were skipped: 2 because no-such-program is not installed; ")
    for number in (1, 2):
        assert f"1 because reason of test_skipped_{number}" in last
