"""`comkd reproduce`: a protocol of the papers, from teachers to the published table beside ours."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import click

from comkd_cli.cli.completing import complete_dataset, complete_recipe
from comkd_cli.cli.options import data_root_option, json_option, numbers, runs_option
from comkd_cli.cli.resuming import Choice

RECIPES = {
    ("base-to-novel", "comkd"): "vitl_to_vitb",
    ("cross-dataset", "comkd"): "vitl_to_vitb_cross",
    ("domain-generalization", "comkd"): "vitl_to_vitb_dg",
    ("base-to-novel", "promptkd"): "promptkd",
    ("cross-dataset", "promptkd"): "promptkd_cross",
    ("domain-generalization", "promptkd"): "promptkd_dg",
}
# PromptKD's figures are those of the epoch that is best on test images, as its released code selects it.
SETTINGS = {"comkd": (), "promptkd": ("selection=promptkd",)}


def _names(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """`dtd,eurosat` and repeated options alike."""
    return tuple(dict.fromkeys(name for value in values for name in value.split(",") if name))


@click.command()
@click.argument(
    "protocol", type=click.Choice(("base-to-novel", "cross-dataset", "domain-generalization")), metavar="PROTOCOL"
)
@click.option(
    "--method", type=click.Choice(tuple(SETTINGS)), default="comkd", show_default=True, help="Method to reproduce."
)
@click.option("--seeds", callback=numbers, default="1,2,3", show_default=True, help="Seeds of the students.")
@click.option(
    "--dataset",
    "--datasets",
    "datasets",
    metavar="NAME",
    multiple=True,
    shell_complete=complete_dataset,
    callback=_names,
    help="Only this dataset of the protocol; may be repeated, or a comma-separated list.",
)
@click.option(
    "--recipe",
    shell_complete=complete_recipe,
    help="A recipe instead of the protocol's own, such as one with smaller models.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a recipe field, such as optim.epochs=10."
)
@runs_option
@data_root_option
@click.option("--dry-run", is_flag=True, help="Print the plan with its time and disk space, and run nothing.")
@json_option
def command(  # noqa: PLR0913 - click passes each option as a parameter
    protocol: Any,
    method: Any,
    seeds: tuple[int, ...],
    datasets: tuple[str, ...],
    recipe: str | None,
    settings: tuple[str, ...],
    runs: Path,
    data_root: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run PROTOCOL of the papers and compare the tables.

    PROTOCOL is base-to-novel, cross-dataset or domain-generalization. Teachers are adapted, students distilled and
    scored. The command first times one training step, then prints the remaining runs with the time and disk space that
    they will need on this machine. Rerun it to resume: finished runs are skipped. Missing datasets are marked in the
    tables. The runs are those of `comkd distill RECIPE --dataset NAME --seed K`; the tables are also written to
    RUNS/reproduce.
    """
    from comkd_cli.cli.terminal import starting
    from comkd_cli.errors import MisuseError
    from comkd_cli.recipe import find_recipe, load_recipe
    from comkd_cli.results.comparison import DATASETS

    if unknown := [name for name in datasets if name not in DATASETS[protocol]]:
        raise MisuseError(
            "is not a dataset of this protocol", field="--dataset", found=unknown[0], allowed=DATASETS[protocol]
        )
    name = recipe or RECIPES[protocol, method]
    choices = [Choice(*pair) for pair in product(datasets or DATASETS[protocol], dict.fromkeys(seeds))]
    given = [*SETTINGS[method], *settings]
    recipes = [load_recipe(name, [*given, *choice.settings()]) for choice in choices]
    with starting():
        from comkd_cli.cli.distiller import accelerator_of
        from comkd_cli.cli.reproduction import Goal, Reproduction
        from comkd_cli.runtime import collectives

        accelerator = accelerator_of(recipes)
    goal = Goal(protocol, method, name, tuple(given), find_recipe(name).stem)
    reproduction = Reproduction(goal, runs, data_root, accelerator, as_json)
    reproduction.plan(choices, recipes)
    if not dry_run:
        reproduction.make()
    reproduction.finish(write=not dry_run)
    collectives.destroy()
