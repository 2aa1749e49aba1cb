"""Tests whose tools are not installed: skipped and counted by hand, failed where CI requires them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.needs_tool("no-such-browser|another-one", "no-such-npm")
def test_with_tools(broken):
    pass

@pytest.mark.needs_tool("no-such-browser|python3")
def test_with_one_of_two():
    pass

def test_of_this_machine():
    pytest.skip("root reads every file")

@pytest.fixture
def broken():
    raise AssertionError("a fixture is made for a test that is skipped")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of three tests with this one's conftest."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers =\n    needs_tool(name): programs\n")
    return tmp_path


def run(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "COMKD_REQUIRE_TOOLS"} | variables
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.slow
def test_a_missing_tool_skips_and_the_last_line_says_how_many_and_why(project: Path) -> None:
    done = run(project)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("2 tests were skipped: ")
    assert "1 because no-such-browser, no-such-npm is not installed" in last
    assert "1 because root reads every file" in last


@pytest.mark.slow
def test_where_tools_are_required_a_missing_one_fails(project: Path) -> None:
    done = run(project, COMKD_REQUIRE_TOOLS="1")
    assert done.returncode == 1
    assert "no-such-browser, no-such-npm is not installed, and COMKD_REQUIRE_TOOLS=1 requires it" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 tests were skipped: 1 because root reads every file"


def test_ci_installs_every_tool_that_tests_need() -> None:
    root = Path(__file__).parents[1]
    script = (root / ".ci/run").read_text()
    assert "COMKD_REQUIRE_TOOLS=1 make test" in script
    for tool, package in (("chromium", "chromium"), ("node", "nodejs"), ("npm", "npm"), ("g++", "g++")):
        assert f"{tool}={package}" in script
    assert "\nfetch_headers\n" in script
