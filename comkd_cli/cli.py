"""The `comkd` command: finds its sub-commands in the folder commands/, and turns errors into messages."""

from __future__ import annotations

import importlib
import io
import pkgutil
import sys
import time
from typing import Any, NoReturn

import click

from comkd_cli import commands, launch
from comkd_cli.errors import ComkdError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
OTHERS_WAIT_SECONDS = 3


class CommandFolder(click.Group):
    """A group whose commands are the modules of comkd_cli/commands, imported when they are asked for.

    The one error boundary: a ComkdError, or a file that the system refuses, is printed as one message
    and ends with its exit code; `--debug` lets the traceback through.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the modules, alphabetically."""
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The `command` of the module of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{commands.__name__}.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command behind the error boundary."""
        for stream in (sys.stdout, sys.stderr):  # a file's name need not be text that they can encode
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except ComkdError as error:
            if ctx.params["debug"]:
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is kept, and the same command goes on from it", INTERRUPTED)
        except OSError as error:
            # Broken pipes are Click's; without a file name it is not the user's to mend.
            if ctx.params["debug"] or isinstance(error, BrokenPipeError) or error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    if not launch.is_main():
        if exit_code >= INTERRUPTED:
            sys.exit(exit_code)
        # What the main process meets too is said by it, and its launcher ends this one while it waits.
        time.sleep(OTHERS_WAIT_SECONDS)
        message = f"process {launch.rank()}: {message}"
    # An interruption is what the user wished, no error.
    label = click.style("error:", fg="red", bold=True) if exit_code < INTERRUPTED else click.style("note:", fg="yellow")
    click.echo(f"{label} {message}", err=True)
    sys.exit(exit_code)


@click.group(
    cls=CommandFolder,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)
@click.version_option(package_name="comkd")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Distil a large CLIP into a small one, prove what it kept, pack it for devices.

    Start with `comkd distill digits`, which needs no download.
    """
