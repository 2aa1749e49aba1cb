"""`comkd datasets`: the datasets of the evaluation suite, whether they are complete, and their splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comkd_cli.cli.completing import complete_dataset
from comkd_cli.cli.options import data_root_option, json_option

if TYPE_CHECKING:
    from comkd_cli.data.check import Check
    from comkd_cli.recipe.catalog import Dataset


@click.group()
def command() -> None:
    """List, check, split and download the suite's datasets."""


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the datasets that comkd knows, with their published counts."""
    from dataclasses import asdict

    from comkd_cli.cli.terminal import Column, print_json, print_table
    from comkd_cli.recipe.catalog import CATALOG

    if as_json:
        print_json([asdict(dataset) for dataset in CATALOG.values()])
        return
    figures = [Column(head) for head in ("classes", "train", "val", "test")]
    columns = [Column("dataset", "word"), Column("folder", "word"), *figures, Column("prompt", "text")]
    rows = []
    for dataset in CATALOG.values():
        counts = (dataset.classes, dataset.train, dataset.val, dataset.test)
        rows.append((dataset.name, dataset.folder, *(f"{n:,}" if n else "-" for n in counts), dataset.template))
    print_table(columns, rows)


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_dataset)
@click.option(
    "--deep",
    is_flag=True,
    help="Also decode every image (slow), and count those with an EXIF orientation, transparency or 16-bit levels.",
)
@data_root_option
@json_option
def check(names: tuple[str, ...], deep: bool, data_root: Path, as_json: bool) -> None:
    """Report whether each dataset is ready, and what to do if not.

    Reads the split files, checks that every image in them exists, and compares the counts with the published
    ones. Without a NAME, all datasets are checked. The exit code is 1 if a named dataset is not ready; without a NAME,
    if no dataset is ready.
    """
    from comkd_cli.cli.terminal import print_json, reporting
    from comkd_cli.data.check import check_dataset
    from comkd_cli.errors import DataError
    from comkd_cli.events import Progress

    checks = []
    with reporting(quiet=as_json) as report:
        for dataset in _chosen(names):

            def tick(done: int, total: int, name: str = dataset.name) -> None:
                if done % 100 == 0 or done == total:
                    report(Progress(name, done, total))

            checks.append(check_dataset(dataset, data_root, deep, tick))
    if as_json:
        print_json([entry.as_plain() for entry in checks])
    else:
        _print_checks(checks)
    not_ready = [entry.dataset for entry in checks if entry.state != "ready"]
    if not_ready and (names or len(not_ready) == len(checks)):
        raise DataError("not ready", path=data_root, found=", ".join(not_ready))


@command.command()
@click.argument("name", shell_complete=complete_dataset)
@click.option("--shots", type=click.IntRange(min=1), help="Draw this many training images per class.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of the draw.")
@click.option(
    "--classes",
    "half",
    type=click.Choice(["all", "base", "new"]),
    default="all",
    show_default=True,
    help="All classes, or one half of them, relabelled from 0.",
)
@data_root_option
@json_option
def split(name: str, shots: int | None, seed: int, half: str, data_root: Path, as_json: bool) -> None:
    """Print the train, val and test images of NAME.

    Only its split files are read. With --json a document {"train": [[path, label, class name], ...], "val": ...,
    "test": ...}, with paths relative to the dataset's folder; otherwise one line per image. --shots draws as CoOp and
    Dassl do.
    """
    from comkd_cli.cli.terminal import print_json
    from comkd_cli.data.split_files import read_splits
    from comkd_cli.data.splits import sample_shots, select_half
    from comkd_cli.edge.visible import visible

    (dataset,) = _chosen((name,))
    splits = read_splits(dataset, data_root)
    if shots is not None:
        splits = sample_shots(splits, shots, seed)
    plain = select_half(splits, half).as_plain()  # type: ignore[arg-type]
    if as_json:
        print_json(plain, indent=None)
        return
    for part, entries in plain.items():
        for path, label, class_name in entries:
            click.echo("\t".join(visible(str(cell), one_line=True) for cell in (part, label, class_name, path)))


@command.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_dataset)
@data_root_option
@json_option
def fetch(names: tuple[str, ...], data_root: Path, as_json: bool) -> None:
    """Download, unpack and check each dataset NAME.

    The mirror is on the Hugging Face Hub. If the connection breaks, the download is resumed; after the command is
    killed, it starts from the beginning. ImageNet and its variants are not on the mirror; for these, the message says
    where to get them.
    """
    from comkd_cli.cli.terminal import print_json, reporting
    from comkd_cli.data.fetch import fetch_dataset
    from comkd_cli.errors import DataError
    from comkd_cli.events import Progress, Stage

    checks = []
    for dataset in _chosen(names):
        with reporting(quiet=as_json) as report:
            report(Stage(f"Fetching {dataset.name}"))

            def tick(done: int, total: int, name: str = dataset.name) -> None:
                report(Progress(f"unpacking {name}", done, total))

            checks.append(fetch_dataset(dataset, data_root, tick, report=report))
    if as_json:
        print_json([entry.as_plain() for entry in checks])
    else:
        _print_checks(checks)
    if not_ready := [entry.dataset for entry in checks if entry.state != "ready"]:
        raise DataError("downloaded, but still not ready", path=data_root, found=", ".join(not_ready))


def _chosen(names: Sequence[str]) -> list[Dataset]:
    from comkd_cli.errors import DataError, did_you_mean
    from comkd_cli.recipe.catalog import CATALOG

    if unknown := [name for name in names if name not in CATALOG]:
        remedy = did_you_mean(unknown[0], CATALOG)
        raise DataError("unknown dataset", found=unknown[0], allowed=list(CATALOG), remedy=remedy)
    return [CATALOG[name] for name in names] or list(CATALOG.values())


def _print_checks(checks: Sequence[Check]) -> None:
    from rich.text import Text

    from comkd_cli.cli.terminal import Column, lines, print_table

    colours = {"ready": "green", "incomplete": "yellow", "missing": "red"}
    columns = [Column("dataset", "word"), Column("state", "word"), Column("images"), Column("what to do", "text")]
    rows = []
    for entry in checks:
        details = lines([*entry.problems, *entry.notes, entry.remedy])
        images = f"{entry.train + entry.val + entry.test:,}"
        rows.append((entry.dataset, Text(entry.state, colours[entry.state]), images, details))
    print_table(columns, rows)
