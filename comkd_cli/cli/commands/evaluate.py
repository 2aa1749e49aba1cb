"""`comkd evaluate`: the scores of students, of their teachers and of plain CLIP models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from comkd_cli.cli.completing import complete_any_dataset, complete_student
from comkd_cli.cli.options import (
    allow_download_option,
    data_root_option,
    json_option,
    numbers,
    runs_option,
    typed_command,
)
from comkd_cli.runtime import ranks

if TYPE_CHECKING:
    from comkd_cli.flows.evaluate import Bench
    from comkd_cli.recipe.model import Data
    from comkd_cli.results.records import Missing, Results
    from comkd_cli.results.result_files import ResultFiles

PROTOCOLS = ("zero-shot", "base-to-novel", "few-shot", "cross-dataset", "domain-generalization")


@click.command()
@click.argument("model", required=False, shell_complete=complete_student)
@click.option(
    "--dataset",
    "datasets",
    metavar="NAME",
    multiple=True,
    shell_complete=complete_any_dataset,
    help="Score on this dataset, digits or one of `comkd datasets list`; may be repeated.",
)
@click.option("--all", "whole_suite", is_flag=True, help="Score on every dataset of the suite, by every protocol.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, exists=True),
    help="Score on this folder, which holds test/<class>/.",
)
@click.option("--classes", type=click.Path(dir_okay=False, exists=True), help="Class names of --folder, one per line.")
@click.option("--template", help="Prompt for the classes of --folder, with {} for the class name.")
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(PROTOCOLS),
    multiple=True,
    help="How to score; may be repeated. Default: zero-shot; with --all every protocol.",
)
@click.option(
    "--shots", callback=numbers, default="1,2,4,8,16", show_default=True, help="Training images per class of few-shot."
)
@click.option("--seeds", callback=numbers, default="1,2,3", show_default=True, help="Seeds of the few-shot draws.")
@runs_option
@data_root_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results.json, .csv, .md and .tex. Default: the student's own, or RUNS.",
)
@allow_download_option
@json_option
def command(  # noqa: PLR0913 - click passes each option as a parameter
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
    """Score students, teachers or any CLIP on test images.

    MODEL is a student.pt, or ARCH:WEIGHTS for any open_clip model (then choose the images with --dataset, --all or
    --folder). A student is scored beside its teacher. Without MODEL, the newest finished students of each dataset under
    RUNS are scored. Each image passes through a model once: features are kept in RUNS/features, and every protocol is
    derived from them. Students get a report.html beside results.json.

    New scores are added to results.json and replace earlier scores of the same kind. If a model or dataset fails, the
    error is printed, the others are still scored, and the exit code is 1. With --all, missing datasets are listed but
    do not change the exit code.
    """
    selected = _select(datasets, whole_suite, folder, classes, template)
    from comkd_cli.cli.terminal import reporting, starting
    from comkd_cli.files import check_writable
    from comkd_cli.results.result_files import ResultFiles

    with starting():
        from comkd_cli.flows import evaluate
        from comkd_cli.models.finished import timeout_minutes
        from comkd_cli.runtime import collectives
        from comkd_cli.runtime.devices import best_device

    home = out or evaluate.home_of(model, runs, own_data=selected == Selection())
    collectives.set_timeout(timeout_minutes(model, runs))
    with reporting(quiet=as_json) as report:
        bench = evaluate.Bench(
            device=best_device(),
            data_root=data_root,
            report=report,
            features=runs / "features",
            data=selected.folder,
            datasets=selected.datasets,
            protocols=protocols or (PROTOCOLS if whole_suite else ("zero-shot",)),
            protocols_named=bool(protocols),
            shots=shots,
            seeds=seeds,
            allow_download=allow_download,
        )
        collectives.in_turn(partial(check_writable, home, "choose another folder for the results with --out"))
        files = ResultFiles(home, report)
        results = _evaluate(model, runs, bench, files)
    collectives.destroy()
    if ranks.is_main():
        _finish(results, files, whole_suite, as_json)


class Selection(NamedTuple):
    """The images to score on: some datasets, a folder, or neither: each student's own."""

    datasets: tuple[str, ...] = ()
    folder: Data | None = None


def _select(
    datasets: tuple[str, ...], whole_suite: bool, folder: str | None, classes: str | None, template: str | None
) -> Selection:
    """What the options select. Raises UsageError for options that cannot be combined, RecipeError for wrong values."""
    if bool(datasets) + whole_suite + (folder is not None) > 1:
        raise click.UsageError("--dataset, --all and --folder cannot be combined")
    if (classes or template) and not folder:
        raise click.UsageError("--classes and --template require --folder")
    from comkd_cli.recipe.catalog import CATALOG
    from comkd_cli.recipe.loading import parse_data

    if folder is not None:
        return Selection(folder=parse_data({"folder": folder, "classes": classes, "template": template}))
    names = tuple(CATALOG) if whole_suite else datasets
    for name in names:
        parse_data({"dataset": name})
    return Selection(names)


def _evaluate(model: str | None, runs: Path, bench: Bench, files: ResultFiles) -> Results:
    """Score, and write the report of the students beside the results; the scores stand if that fails."""
    from comkd_cli.errors import WriteError
    from comkd_cli.events import Notice, Stage
    from comkd_cli.flows.evaluate import evaluate
    from comkd_cli.flows.report import NAME, RunCollector
    from comkd_cli.report.details import Making

    collector = RunCollector(bench.report)
    listening = replace(bench, report=collector.report, on_scored=collector.observe)
    results = evaluate(model, runs, listening, collector.closing(files.add))
    if collector.runs:
        path = files.folder / NAME
        bench.report(Stage(f"Report: {path}"))
        try:
            collector.write(path, Making(typed_command(), runs, bench.data_root))
        except WriteError as error:
            bench.report(Notice(str(error)))
    return results


def _finish(results: Results, files: ResultFiles, whole_suite: bool, as_json: bool) -> None:
    """Print the scores, then raise the error of writing them, or a DataError that names what could not be scored.

    Missing datasets fail the command unless the whole suite was chosen.
    """
    from comkd_cli.cli.terminal import output, print_json
    from comkd_cli.errors import DataError
    from comkd_cli.results.records import as_plain
    from comkd_cli.results.result_files import NAME

    failed = [entry for entry in results.missing if entry.failed or not whole_suite]
    if as_json:
        print_json(as_plain(results))
    else:
        _print(results, [entry for entry in results.missing if entry not in failed])
    if files.problem is not None:
        raise files.problem
    if not as_json:
        place = f"{files.folder / NAME}: {files.records_in_all} records in all"
        output().print(place, style="dim", markup=False, soft_wrap=True)
    if failed:
        lines = "\n".join("  " + entry.line.replace("\n", "\n  ") for entry in failed)
        raise DataError(f"{len(failed)} of the models and datasets could not be scored:\n{lines}")


def _print(results: Results, absent: Sequence[Missing]) -> None:
    """The tables of results.md, and the datasets that are missing."""
    from comkd_cli.cli.terminal import Column, output, print_table
    from comkd_cli.results.tables import tables

    for made in tables(results.records):
        columns = [Column(head, "figure" if made.is_figures(head) else "text") for head in made.heads]
        print_table(columns, made.rows, made.title, made.note)
    for entry in absent:
        output().print(f"not scored: {entry.problem}", style="yellow", markup=False)
