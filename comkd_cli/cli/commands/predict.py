"""`comkd predict`: classify images with a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from comkd_cli.cli.options import json_option


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to print per image.")
@click.option("--precision", help="fp32, fp16 or int8. Default: the first that BUNDLE has.")
@click.option(
    "--add-class",
    "add_classes",
    metavar="NAME",
    multiple=True,
    help="Add this class to those of BUNDLE; may be repeated.",
)
@json_option
def command(
    bundle: Path,
    images: tuple[str, ...],
    top: int,
    precision: str | None,
    add_classes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print the most probable classes of each IMAGE, by the exported BUNDLE. Needs no torch."""
    from comkd_cli.cli.terminal import output, print_json
    from comkd_cli.errors import DataError
    from comkd_cli.flows.predict import predict

    records = predict(bundle, images, top, precision, add_classes)
    if as_json:
        print_json({"predictions": records})
    else:
        console = output()
        for record in records:
            if "classes" in record:
                console.print(record["image"], style="bold", markup=False, soft_wrap=True)
                for entry in record["classes"]:
                    line = f"  {entry['probability']:7.2%}  {entry['class']}"
                    console.print(line, markup=False, soft_wrap=True)
    if unreadable := [record["error"] for record in records if "error" in record]:
        raise DataError("some images could not be read:\n  " + "\n  ".join(unreadable))
