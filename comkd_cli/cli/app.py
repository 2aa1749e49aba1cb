"""The `comkd` command: finds its sub-commands in the folder commands/, and turns errors into messages."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import pkgutil
import sys
import time
from contextlib import nullcontext, suppress
from typing import Any, NoReturn

import click

from comkd_cli.cli import commands
from comkd_cli.cli.examples import add_examples
from comkd_cli.cli.quiet import quiet_libraries
from comkd_cli.edge.visible import visible
from comkd_cli.errors import ComkdError
from comkd_cli.files import ERRORS_WITHOUT_FILENAME, REMEDIES
from comkd_cli.runtime import ranks
from comkd_cli.runtime.cores import sharing_cores
from comkd_cli.runtime.imports import defer_compiler

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
FIRST_SIGNAL = 129  # 128 + SIGHUP, the lowest: from here on a code means a stop that was requested
OTHER_RANKS_WAIT_SECONDS = 3
NO_SPACE = ERRORS_WITHOUT_FILENAME  # of a disk that is full, read-only or lost


class CommandFolder(click.Group):
    """A group whose commands are the modules of comkd_cli/cli/commands, each imported when it is used.

    It is the only error boundary: a ComkdError, or an OSError about a file, is printed as one message and sets the
    exit code; with `--debug` the traceback is shown.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the modules, alphabetically, with hyphens for underscores."""
        return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The `command` of the module of that name, with its examples."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        add_examples(cmd_name, command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name. Raises UsageError, with the nearest name, for an unknown one."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line. Characters that the terminal cannot encode are escaped."""
        for stream in (sys.stdout, sys.stderr):  # file names may hold such characters
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command behind the error boundary."""
        debug = ctx.params["debug"]
        try:
            defer_compiler()
            with sharing_cores(), nullcontext() if debug else quiet_libraries():
                result = super().invoke(ctx)
                sys.stdout.flush()  # raises on a full disk here, not at exit
                return result
        except ComkdError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; rerun the same command to resume", INTERRUPTED)
        except OSError as error:
            # Click handles broken pipes; an error without a file name or a full disk is a bug, not the user's.
            if debug or isinstance(error, BrokenPipeError) or (error.filename is None and error.errno not in NO_SPACE):
                raise
            if error.filename is None:
                _drop_output()
            remedy = f"; {REMEDIES[error.errno]}" if error.errno in NO_SPACE else ""
            _fail(f"{error.filename or 'output'}: {error.strerror}{remedy}", 1)


def _drop_output() -> None:
    """Discard what could not be written to standard output; Python would try again at exit."""
    with suppress(OSError, ValueError):  # a test's stream has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, exit_code: int) -> NoReturn:
    if not ranks.is_main():
        if exit_code >= FIRST_SIGNAL:
            sys.exit(exit_code)
        # If the main process fails too, it prints the error, and its launcher ends this process during the wait.
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
        message = f"process {ranks.rank()}: {message}"
    # A stop that the user requested is not an error.
    label = (
        click.style("error:", fg="red", bold=True) if exit_code < FIRST_SIGNAL else click.style("note:", fg="yellow")
    )
    click.echo(f"{label} {visible(message)}", err=True)
    sys.exit(exit_code)


@click.group(
    cls=CommandFolder,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)
@click.version_option(package_name="comkd")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Distil a large CLIP into a small one, measure what it retains, and export it for devices.

    Start with `comkd distill digits`, which downloads nothing.
    """
