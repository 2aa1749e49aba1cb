"""`comkd inspect`: what a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from comkd_cli.cli.options import json_option


@click.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@json_option
def command(file: Path, as_json: bool) -> None:
    """Describe FILE: an .onnx file, a bundle or a .pt file.

    It prints kind, size, classes, pre-processing, precision, inputs and outputs, figures, sha256 and origin. Nothing in
    the file is executed. The exit code is 1 for other files, and for a bundle whose files are missing or have changed
    since the export; reference/ may be removed.
    """
    from comkd_cli.cli.inspected import escaped, escaped_json, rows
    from comkd_cli.cli.terminal import print_pairs
    from comkd_cli.errors import BundleError, ComkdError

    try:
        document = _document(file)
    except ComkdError as error:
        raise ComkdError(escaped(str(error))) from error  # it may quote the file
    if as_json:
        click.echo(escaped_json(document))
    else:
        print_pairs(rows(document))
    files = document.get("files")
    if files and (faulty := [*files["changed"], *files["missing"]]):
        raise BundleError(
            "has files that are missing or have changed since the export",
            path=escaped(str(file)),
            found=escaped(", ".join(faulty)),
            remedy="export the bundle again",
        )


def _document(file: Path) -> dict[str, Any]:
    from comkd_cli.flows.inspect.exported import inspect_bundle, inspect_graph
    from comkd_cli.flows.inspect.kinds import kind_of

    kind = kind_of(file)
    if kind == "checkpoint":
        from comkd_cli.cli.terminal import starting

        with starting():
            from comkd_cli.flows.inspect.checkpoints import inspect_checkpoint
        return inspect_checkpoint(file)
    return inspect_bundle(file) if kind == "bundle" else inspect_graph(file)
