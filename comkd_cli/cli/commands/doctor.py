"""`comkd doctor`: whether this machine can run comkd, and what to do about it."""

from __future__ import annotations

from pathlib import Path

import click

from comkd_cli.cli.options import data_root_option, json_option, runs_option


@click.command()
@runs_option
@data_root_option
@json_option
def command(runs: Path, data_root: Path, as_json: bool) -> None:
    """Check whether this machine can run comkd.

    It checks Python, the required packages, torch and torchvision, the GPU and its driver, cores, memory, disk,
    datasets and cached weights. Each finding has a remedy. Nothing is downloaded. The exit code is 1 if `comkd distill`
    could not run. Put the output of --json into a bug report.
    """
    from rich.text import Text

    from comkd_cli.cli.terminal import Column, lines, print_json, print_table, starting
    from comkd_cli.errors import ComkdError

    with starting():
        from comkd_cli.flows.doctor import examine

        examination = examine(runs, data_root)
    if as_json:
        print_json(examination.document())
    else:
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        rows = [
            (check.name, Text(check.state, colours[check.state]), lines((check.found, check.remedy)))
            for check in examination.checks
        ]
        print_table([Column("check", "word"), Column("state", "word"), Column("found, and what to do", "text")], rows)
    if examination.errors:
        raise ComkdError("this machine cannot run comkd", found=", ".join(check.name for check in examination.errors))
