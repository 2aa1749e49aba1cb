"""`comkd distill`: teacher to student."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import click

from comkd_cli.cli.completing import complete_any_dataset, complete_recipe
from comkd_cli.cli.options import data_root_option, runs_option
from comkd_cli.cli.resuming import Choice


@click.command()
@click.argument("recipe", shell_complete=complete_recipe)
@click.option(
    "--dataset",
    "datasets",
    metavar="NAME",
    multiple=True,
    shell_complete=complete_any_dataset,
    help="Train on this dataset; may be repeated.",
)
@click.option(
    "--all", "whole_suite", is_flag=True, help="Train on each of the suite's eleven datasets found in --data-root."
)
@click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="Run with this seed; may be repeated.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a recipe field, such as optim.epochs=10.",
)
@runs_option
@data_root_option
@click.option("--fresh", is_flag=True, help="Start from scratch, discarding any existing run.")
@click.option("--precompute", is_flag=True, help="Fill the teacher cache and train no student.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and run nothing.")
def command(  # noqa: PLR0913 - click passes each option as a parameter
    recipe: str,
    datasets: tuple[str, ...],
    whole_suite: bool,
    seeds: tuple[int, ...],
    settings: tuple[str, ...],
    runs: Path,
    data_root: Path,
    fresh: bool,
    precompute: bool,
    dry_run: bool,
) -> None:
    """Distil a teacher into a student as RECIPE says.

    RECIPE is a YAML file or the name of a bundled recipe. The student is written to
    RUNS/<recipe>/<dataset>/seed<k>/student.pt. An interrupted run is resumed; a finished one is not
    repeated. Several GPUs: torchrun --nproc-per-node N -m comkd_cli distill RECIPE.
    """
    from comkd_cli.cli.terminal import starting
    from comkd_cli.recipe import find_recipe, load_recipe

    if datasets and whole_suite:
        raise click.UsageError("--dataset and --all cannot be combined")
    if fresh and precompute:
        raise click.UsageError("--fresh and --precompute cannot be combined: cached crops are never recomputed")
    if whole_suite:
        datasets = _suite_below(data_root)
    choices = [Choice(dataset, seed) for dataset, seed in product(datasets or [None], seeds or [None])]
    recipes = [load_recipe(recipe, [*settings, *choice.settings()]) for choice in choices]
    with starting():
        from comkd_cli.cli.distiller import Distiller, accelerator_of
        from comkd_cli.runtime import collectives

        accelerator = accelerator_of(recipes)
    name = find_recipe(recipe).stem
    if dry_run:
        from comkd_cli.cli.dry_run import DryRun

        plan = DryRun(name, runs, data_root, accelerator.device.type)
        for each in recipes:
            plan.print(each)
    else:
        distiller = Distiller(name, runs, data_root, accelerator)
        distiller.precompute = precompute
        distiller.make_all(recipes, choices, fresh)
    collectives.destroy()


def _suite_below(data_root: Path) -> tuple[str, ...]:
    """The suite's datasets whose folders exist; a message names the others."""
    from comkd_cli.cli.terminal import messages
    from comkd_cli.errors import DataError
    from comkd_cli.recipe.catalog import CATALOG
    from comkd_cli.results.tables import ELEVEN

    found = tuple(name for name in ELEVEN if (data_root / CATALOG[name].folder).is_dir())
    if missing := [name for name in ELEVEN if name not in found]:
        messages().print(f"not found in {data_root}: {', '.join(missing)} (see `comkd datasets check`)", markup=False)
    if not found:
        raise DataError("holds none of the suite's datasets", path=data_root, remedy="set --data-root, or fetch one")
    return found
