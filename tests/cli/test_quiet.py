import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from comkd_cli.cli.quiet import quiet_libraries

NOISE = """
import logging, os, subprocess, sys, warnings
import click

@click.command()
def command():
    "Warn and log as libraries do."
    warnings.warn("from a library", UserWarning)
    warnings.simplefilter("always")  # as scikit-learn does for its own
    warnings.warn("again", FutureWarning)
    logging.warning("a log line")
    logging.getLogger("some.library").error("another")
    warnings.warn("CUDA initialization: the driver is too old\\n (where it was)", UserWarning)
    subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('from a child')"])
    click.echo("done")
"""
RUN = """
import sys
from comkd_cli.cli import commands
from comkd_cli.cli.app import main
commands.__path__.append(sys.argv.pop(1))
main(prog_name="comkd")
"""


@pytest.fixture
def noisy(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command that warns and logs as libraries do, as a process."""
    (tmp_path / "noise.py").write_text(NOISE)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RUN, str(tmp_path), *options, "noise"]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)

    return run


def test_library_warnings_are_hidden_except_those_that_a_user_can_act_on(
    noisy: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    said = noisy()
    assert said.stdout == "done\n"
    assert said.stderr == "note: CUDA initialization: the driver is too old\n"


def test_debug_shows_all_of_it(noisy: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    said = noisy("--debug").stderr
    for words in ("from a library", "again", "a log line", "another", "CUDA initialization", "from a child"):
        assert words in said


def test_everything_is_as_before_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_VERBOSITY", "info")
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    before = dict(os.environ), warnings.showwarning, list(logging.root.handlers)
    with quiet_libraries():
        assert os.environ["HF_HUB_VERBOSITY"] == "info"  # what the user set stays
        assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    assert before == (dict(os.environ), warnings.showwarning, logging.root.handlers)


def test_a_warning_that_is_an_error_stays_one() -> None:
    with pytest.raises(UserWarning, match="odd"), quiet_libraries():
        warnings.warn("odd", UserWarning, stacklevel=1)
