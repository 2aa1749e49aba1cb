"""`comkd evaluate`: what a student kept of its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comkd_cli.options import data_root_option, json_option, runs_option

if TYPE_CHECKING:
    from comkd_cli.recipe.model import Data
    from comkd_cli.results import Record


@click.command()
@click.argument("model", required=False)
@click.option("--dataset", metavar="NAME", help="Score on this data set: digits, or one of `comkd datasets list`.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, exists=True),
    help="Score on this folder, with test/ and a sub-folder a class in it.",
)
@click.option("--classes", type=click.Path(dir_okay=False, exists=True), help="Class names of --folder, one a line.")
@click.option("--template", help="Prompt of a class of --folder, {} standing for its name.")
@runs_option
@data_root_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results.json. Left out: the student's own, or RUNS.",
)
@json_option
def command(
    model: str | None,
    dataset: str | None,
    folder: str | None,
    classes: str | None,
    template: str | None,
    runs: Path,
    data_root: Path,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score a student and its teacher, zero-shot, on the test images.

    MODEL is a student.pt, or ARCH:WEIGHTS for any open_clip model (then say on what, with --dataset or
    --folder). Left out, the newest finished student of each data set under RUNS is scored.
    """
    if dataset and folder:
        raise click.UsageError("--dataset and --folder exclude each other")
    if (classes or template) and not folder:
        raise click.UsageError("--classes and --template describe --folder")
    from comkd_cli.terminal import messages, output, reporting

    data = _data(dataset, folder, classes, template)
    with messages().status("starting"):  # importing torch takes seconds
        from comkd_cli.devices import best_device
        from comkd_cli.files import write_text
        from comkd_cli.flows import evaluate
        from comkd_cli.results import to_json

    with reporting(quiet=as_json) as report:
        bench = evaluate.Bench(best_device(), data_root, report, data)
        records = evaluate.evaluate(model, runs, bench)
    written = (out or evaluate.home_of(model, runs)) / "results.json"
    write_text(written, to_json(records))
    if as_json:
        click.echo(to_json(records), nl=False)
        return
    output().print(_table(records))
    output().print(written, style="dim", markup=False)


def _data(dataset: str | None, folder: str | None, classes: str | None, template: str | None) -> Data | None:
    if dataset is None and folder is None:
        return None
    from comkd_cli.recipe.loading import parse_data

    return parse_data({"dataset": dataset, "folder": folder, "classes": classes, "template": template})


def _table(records: Sequence[Record]) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data")
    table.add_column("model", overflow="fold")
    for title in ("images", "top-1 %", "mean per class %", "agreement %", "tower parameters"):
        table.add_column(title, justify="right")
    for record in records:
        table.add_row(
            escape(record.dataset),
            f"{record.role} [dim]{escape(record.model)}[/dim]",
            f"{record.images:,}",
            _percent(record.top1_percent),
            _percent(record.mean_per_class_percent),
            _percent(record.agreement_percent),
            f"{record.image_tower_parameters:,}",
        )
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
