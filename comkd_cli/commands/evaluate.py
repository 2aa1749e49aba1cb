"""`comkd evaluate`: what a student kept of its teacher, and how models do on the suite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from comkd_cli import launch
from comkd_cli.options import allow_download_option, data_root_option, json_option, numbers, runs_option

if TYPE_CHECKING:
    from comkd_cli.recipe.model import Data
    from comkd_cli.results import Results

PROTOCOLS = ("zero-shot", "base-to-novel", "few-shot", "cross-dataset", "domain-generalization")


@click.command()
@click.argument("model", required=False)
@click.option(
    "--dataset",
    "datasets",
    metavar="NAME",
    multiple=True,
    help="Score on this data set: digits, or one of `comkd datasets list`; may be repeated.",
)
@click.option("--all", "whole_suite", is_flag=True, help="Score on every data set of the suite, by every protocol.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, exists=True),
    help="Score on this folder, with test/ and a sub-folder a class in it.",
)
@click.option("--classes", type=click.Path(dir_okay=False, exists=True), help="Class names of --folder, one a line.")
@click.option("--template", help="Prompt of a class of --folder, {} standing for its name.")
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(PROTOCOLS),
    multiple=True,
    help="How to score; may be repeated. Left out: zero-shot, with --all every one.",
)
@click.option("--shots", callback=numbers, default="1,2,4,8,16", show_default=True, help="Of few-shot.")
@click.option("--seeds", callback=numbers, default="1,2,3", show_default=True, help="Of the few-shot draws.")
@runs_option
@data_root_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results.json, .csv, .md and .tex. Left out: the student's own, or RUNS.",
)
@allow_download_option
@json_option
def command(
    model: str | None,
    datasets: tuple[str, ...],
    whole_suite: bool,
    folder: str | None,
    classes: str | None,
    template: str | None,
    protocols: tuple[str, ...],
    shots: tuple[int, ...],
    seeds: tuple[int, ...],
    runs: Path,
    data_root: Path,
    out: Path | None,
    allow_download: bool,
    as_json: bool,
) -> None:
    """Score students beside their teachers, or any CLIP, on test images.

    MODEL is a student.pt, or ARCH:WEIGHTS for any open_clip model (then say on what, with --dataset, --all or
    --folder). Left out, the newest finished students of each data set under RUNS are scored. Each image goes
    through a model once: features are kept in RUNS/features, and every protocol is derived from them.
    """
    if bool(datasets) + whole_suite + (folder is not None) > 1:
        raise click.UsageError("--dataset, --all and --folder exclude one another")
    if (classes or template) and not folder:
        raise click.UsageError("--classes and --template describe --folder")
    from comkd_cli.catalog import CATALOG
    from comkd_cli.terminal import messages, output, reporting

    names = tuple(CATALOG) if whole_suite else datasets
    data = _data(names, folder, classes, template)
    with messages().status("starting"):  # importing torch takes seconds
        from comkd_cli import processes
        from comkd_cli.devices import best_device
        from comkd_cli.flows import evaluate

    with reporting(quiet=as_json) as report:
        bench = evaluate.Bench(
            device=best_device(),
            data_root=data_root,
            report=report,
            features=runs / "features",
            data=None if names and model is None else data,
            datasets=names if len(names) > 1 or (names and model is None) else (),
            protocols=protocols or (PROTOCOLS if whole_suite else ("zero-shot",)),
            shots=shots,
            seeds=seeds,
            allow_download=allow_download,
        )
        results = evaluate.evaluate(model, runs, bench)
    processes.leave()
    if not launch.is_main():
        return
    home = out or evaluate.home_of(model, runs, own_data=data is None)
    _write(results, home)
    if as_json:
        from comkd_cli.results import to_json

        click.echo(to_json(results), nl=False)
        return
    for table in _tables(results):
        output().print(table)
    for entry in results.missing:
        output().print(f"not scored: {entry.problem}", style="yellow", markup=False)
    output().print(str(home / "results.json"), style="dim", markup=False, soft_wrap=True)


def _data(names: tuple[str, ...], folder: str | None, classes: str | None, template: str | None) -> Data | None:
    from comkd_cli.recipe.loading import parse_data

    checked = [parse_data({"dataset": name}) for name in names]
    if folder is not None:
        return parse_data({"folder": folder, "classes": classes, "template": template})
    return checked[0] if len(checked) == 1 else None


def _write(results: Results, home: Path) -> None:
    from comkd_cli.files import write_text
    from comkd_cli.results import to_json
    from comkd_cli.tables import to_csv, to_latex, to_markdown

    write_text(home / "results.json", to_json(results))
    write_text(home / "results.csv", to_csv(results.records))
    write_text(home / "results.md", to_markdown(results))
    write_text(home / "results.tex", to_latex(results))


def _tables(results: Results) -> list[object]:
    """The tables of results.md for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    from comkd_cli.tables import tables

    shown: list[object] = []
    for made in tables(results.records):
        table = Table(title=made.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.caption, table.caption_justify = made.note or None, "left"
        for position, head in enumerate(made.heads):
            if position:
                table.add_column(head, justify="right")
            else:
                table.add_column(head, overflow="fold")
        for row in made.rows:
            table.add_row(*map(escape, row))
        shown.append(table)
    return shown
