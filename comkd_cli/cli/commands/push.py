"""`comkd push`: a bundle onto the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Make a new repository public. Default: private.")
@click.option("--dry-run", is_flag=True, help="Print what would be uploaded, and upload nothing.")
def command(bundle: Path, repo: str, public: bool, dry_run: bool) -> None:
    """Upload BUNDLE to REPO on the Hugging Face Hub.

    REPO is OWNER/NAME. The model card and the files of the bundle's manifest are uploaded, and nothing else in the
    folder; they are printed first. A repository that does not exist is created, private without --public. Log in with
    HF_TOKEN or `hf auth login`; HF_ENDPOINT selects another Hub.
    """
    from rich.filesize import decimal

    from comkd_cli.cli.terminal import Column, output, print_table, reporting, starting

    with starting():
        from comkd_cli.errors import MisuseError
        from comkd_cli.flows.hub import HubBundle, files_to_push, push

    target = HubBundle.parse(repo)
    if target.revision is not None:
        raise MisuseError("includes a revision", found=repo, remedy="use OWNER/NAME; a push goes to the main branch")
    files = files_to_push(bundle)
    print_table([Column("file", "text"), Column("size")], [(file.name, decimal(file.size)) for file in files])
    total = decimal(sum(file.size for file in files))
    visibility = "public" if public else "private"
    console = output()
    console.print(f"{total} to {target.repository}, {visibility}", markup=False, soft_wrap=True)
    if dry_run:
        return
    with reporting() as report:
        address = push(files, target.repository, public, report)
    console.print(f"{address}\n  comkd predict hf:{target.repository} IMAGE...", markup=False, soft_wrap=True)
