"""`comkd pull`: a bundle from the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command()
@click.argument("repo")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the bundle. Default: the name of the repository.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def command(repo: str, out: Path | None, force: bool) -> None:
    """Download the bundle in REPO on the Hugging Face Hub.

    REPO is OWNER/NAME or OWNER/NAME@REVISION. A file that has changed since the export is refused; nothing in the
    bundle is executed. `comkd predict hf:REPO IMAGE` uses a bundle from the Hub's cache and writes no folder.
    """
    from comkd_cli.cli.terminal import output, reporting, starting

    with starting():
        from comkd_cli.flows.hub import HubBundle, pull

    source = HubBundle.parse(repo)
    target = out or Path(source.repository.partition("/")[2])
    with reporting() as report:
        pull(source, target, force, report)
    line = f"bundle: {target}\n  comkd predict {shlex.quote(str(target))} IMAGE..."
    output().print(line, markup=False, soft_wrap=True)
