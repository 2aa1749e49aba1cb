"""`comkd export`: student to bundle."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from comkd_cli.options import data_root_option, json_option


@click.command()
@click.argument("student", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--onnx", is_flag=True, help="Export to ONNX; the only format so far, and the default.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="The bundle. Left out: `bundle` beside STUDENT.",
)
@click.option(
    "--images",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder of real images for the parity check. Left out: the student's own data.",
)
@data_root_option
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@json_option
def command(
    student: Path,
    onnx: bool,
    out: Path | None,
    images: Path | None,
    data_root: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Export STUDENT.pt to a bundle: ONNX graphs, checked in onnxruntime, and a predict.py without torch.

    The graphs must answer as the student does on real images at batch sizes 1, 2 and 7, or no bundle is
    left.
    """
    from comkd_cli.terminal import messages, reporting

    target = out or student.parent / "bundle"
    with messages().status("starting"):  # importing torch takes seconds
        from comkd_cli.flows import export
    with reporting(quiet=as_json) as report:
        manifest = export.export(student, target, data_root, report, force, images)
    if as_json:
        click.echo(json.dumps(manifest, indent=2, ensure_ascii=False))
    else:
        _print_bundle(target, manifest)


def _print_bundle(target: Path, manifest: dict[str, Any]) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    from comkd_cli.terminal import output

    table = Table("file", "size", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for name, entry in manifest["files"].items():
        table.add_row(name, decimal(entry["bytes"]))
    console = output()
    console.print(table)
    console.print(
        f"bundle: {target}\n  comkd predict {shlex.quote(str(target))} IMAGE...", markup=False, soft_wrap=True
    )
