"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

runs_option = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of all runs.",
)
data_root_option = click.option(
    "--data-root",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="COMKD_DATA",
    default=Path("data"),
    show_default=True,
    help="Folder of datasets.",
    show_envvar=True,
)
allow_download_option = click.option(
    "--allow-download",
    is_flag=True,
    help="Download files that a student.pt refers to and this machine lacks, such as its backbone or its teacher.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def numbers(_context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Parse `1,2,4` into positive integers; the callback of an option."""
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(f"{value!r} should be positive integers, such as 1,2,4", param=parameter)
    return found


def typed_command() -> str:
    """The command line as it was typed, as a shell accepts it."""
    return shlex.join(["comkd", *sys.argv[1:]])
