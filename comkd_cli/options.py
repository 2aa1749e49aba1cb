"""Options that several commands share."""

from __future__ import annotations

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
    help="Folder of data sets.",
    show_envvar=True,
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
