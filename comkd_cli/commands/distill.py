"""`comkd distill`: teacher to student."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comkd_cli import launch
from comkd_cli.options import data_root_option, runs_option

if TYPE_CHECKING:
    from comkd_cli.data.source import Source
    from comkd_cli.flows.distill import Outline
    from comkd_cli.progress import Report
    from comkd_cli.recipe import Recipe


@click.command()
@click.argument("recipe")
@click.option("--dataset", "datasets", metavar="NAME", multiple=True, help="Learn from this data set; may be repeated.")
@click.option(
    "--all", "whole_suite", is_flag=True, help="Learn from each of the suite's eleven data sets that is there."
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
@click.option("--fresh", is_flag=True, help="Start anew, also where a finished or a stopped run is there.")
@click.option(
    "--precompute",
    is_flag=True,
    help="Fill the teacher cache, and train no student: a big machine teaches, others learn.",
)
@click.option("--dry-run", is_flag=True, help="Print what would run, and run nothing.")
def command(
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

    RECIPE is a YAML file or the name of a bundled recipe. The student goes to
    RUNS/<recipe>/<dataset>/seed<k>/student.pt. A run that was stopped goes on where it was; a finished
    one is not repeated. Several GPUs: torchrun --nproc-per-node N -m comkd_cli distill RECIPE.
    """
    from comkd_cli.recipe import find_recipe, load_recipe
    from comkd_cli.terminal import messages, reporting

    if datasets and whole_suite:
        raise click.UsageError("--dataset and --all exclude each other")
    if fresh and precompute:
        raise click.UsageError(
            "--fresh and --precompute exclude each other: crops that are there are not asked for again"
        )
    if whole_suite:
        datasets = _suite_below(data_root)
    choices = product(
        [[f"data.dataset={dataset}"] for dataset in datasets] or [[]], [[f"seed={seed}"] for seed in seeds] or [[]]
    )
    loaded = [load_recipe(recipe, [*settings, *dataset, *seed]) for dataset, seed in choices]
    if len(precisions := sorted({chosen.precision for chosen in loaded})) > 1:
        raise click.UsageError(f"the data sets differ in precision ({', '.join(precisions)}); run them one at a time")
    name = find_recipe(recipe).stem
    with messages().status("starting"):  # importing torch takes seconds
        from comkd_cli import processes
        from comkd_cli.data.sources import open_source
        from comkd_cli.devices import failures_explained
        from comkd_cli.errors import CheckpointError, ComkdError, DataError, ModelError
        from comkd_cli.flows import adapt, distill
        from comkd_cli.progress import once
        from comkd_cli.training import make_accelerator

        accelerator = make_accelerator(loaded[0].precision)

    told: set[str] = set()  # of a dataset, which every seed opens
    problems: list[ComkdError] = []
    for chosen in loaded:
        if dry_run:
            _print_plan(chosen, name, runs, data_root, accelerator.device.type, told)
            continue
        try:
            with reporting() as report:
                new = once(report, told)
                opened = partial(open_source, chosen.data, data_root, runs, new, fetch=True)
                source = processes.agreed(opened)
                stage = processes.agreed(partial(adapt.stage_1, chosen, source, data_root, runs, new))
                run = distill.Run(chosen, name, source, runs, stage.contents, stage.key)
                done = not precompute and not fresh and distill.finished(run, new)
            if done:
                messages().print(f"already finished: {run.student_file} (--fresh repeats it)", markup=False)
                continue
            line = _resume_line()
            with reporting() as report, failures_explained():
                teach = partial(adapt.ready_teacher, stage, accelerator, report, line)
                if precompute:
                    distill.precompute(run, teach, accelerator, report)
                    continue
                distill.distill(run, teach, accelerator, report, line, fresh)
        except (DataError, CheckpointError, ModelError) as error:
            if len(loaded) == 1:
                raise
            messages().print(f"left out: {error}", style="yellow", markup=False)  # the others go on
            problems.append(error)
            continue
        _print_next_steps(run.student_file)
    processes.leave()
    if problems:
        raise DataError(f"{len(problems)} of {len(loaded)} runs could not be made; the reasons stand above")


def _suite_below(data_root: Path) -> tuple[str, ...]:
    """The suite's data sets whose folders are there; the others are told."""
    from comkd_cli.catalog import CATALOG
    from comkd_cli.errors import DataError
    from comkd_cli.tables import ELEVEN
    from comkd_cli.terminal import messages

    there = tuple(name for name in ELEVEN if (data_root / CATALOG[name].folder).is_dir())
    if absent := [name for name in ELEVEN if name not in there]:
        messages().print(f"not below {data_root}: {', '.join(absent)} (see `comkd datasets check`)", markup=False)
    if not there:
        raise DataError(f"{data_root}: holds none of the suite's data sets; give --data-root, or fetch one")
    return there


def _resume_line() -> str:
    """The command as it was typed, less --fresh, which would throw away what is to be gone on with."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    if launch.world_size() == 1:
        return shlex.join(["comkd", *words])
    launcher = "torchrun ..." if launch.on_several_machines() else f"torchrun --nproc-per-node {launch.per_machine()}"
    return f"{launcher} -m comkd_cli {shlex.join(words)}"


def _print_plan(recipe: Recipe, name: str, runs: Path, data_root: Path, device: str, told: set[str]) -> None:
    """A table of what would run. Images that are not there are a row of it: the models are told all the same.

    told: notices that need not be said again.
    """
    from rich.markup import escape
    from rich.table import Table

    from comkd_cli import processes
    from comkd_cli.catalog import CATALOG
    from comkd_cli.data.sources import open_source
    from comkd_cli.errors import DataError
    from comkd_cli.flows import distill
    from comkd_cli.progress import once
    from comkd_cli.terminal import output, reporting

    rows: dict[str, str] = {}
    try:
        with reporting() as report:
            opened = partial(open_source, recipe.data, data_root, runs, once(report, told))
            source = processes.agreed(opened)
    except DataError as error:
        known = CATALOG.get(recipe.data.dataset or "")
        outline = distill.outline(recipe, known.classes if known else 1)  # classes add no parameters
        rows["images"] = f"{error}; {known.classes} classes" if known else str(error)
    else:
        outline = distill.outline(recipe, len(source.class_names))
        with reporting() as report:
            rows |= _data_rows(recipe, name, runs, data_root, source, outline, once(report, told))
    ratio = outline.teacher_image_tower_parameters / outline.student_image_tower_parameters
    less = outline.teacher_multiply_adds / outline.student_multiply_adds
    share = outline.student_trainable_parameters / outline.student_image_tower_parameters
    rows["teacher"] = (
        f"{outline.teacher_parameters:,} parameters; its image tower {outline.teacher_image_tower_parameters:,}, "
        f"{outline.teacher_multiply_adds / 1e9:.3g} G multiply-adds an image"
    )
    rows["student"] = (
        f"image tower {outline.student_image_tower_parameters:,} parameters, 1/{ratio:.1f} of the teacher's; "
        f"{outline.student_multiply_adds / 1e9:.3g} G multiply-adds an image, 1/{less:.1f}; "
        f"{outline.student_trainable_parameters:,} trainable ({share:.1%})"
    )
    together = f", {launch.world_size()} processes" if launch.world_size() > 1 else ""
    rows["device"] = f"{device}, {recipe.precision}{together}"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for row in ("images", "teacher", "stage 1", "student", "stage 2", "cache", "device", "writes", "state"):
        if row in rows:
            table.add_row(row, escape(rows[row]))
    output().print(table)


def _data_rows(
    recipe: Recipe, name: str, runs: Path, data_root: Path, source: Source, outline: Outline, report: Report
) -> dict[str, str]:
    """What the images that are there decide."""
    from comkd_cli.errors import DataError
    from comkd_cli.flows import adapt, distill
    from comkd_cli.teacher_cache import CacheKey

    train, test = len(source.train), len(source.test) if source.test else 0
    told = f"{source.name}: {train:,} to learn from, {test:,} to test on, {outline.classes} classes"
    rows = {"images": told}
    if cache := recipe.teacher_cache:
        key = CacheKey("", train, outline.teacher_dim, cache.views, cache.dtype)
        rows["cache"] = f"{cache.views} crops of each image, {key.size_bytes / 1e6:,.1f} MB when full"
    try:
        stage = adapt.stage_1(recipe, source, data_root, runs, report)
    except DataError as error:  # of the data that the teacher is adapted on
        return {**rows, "stage 1": str(error)}
    rows["stage 1"] = adapt.describe_stage(stage)
    plan = distill.plan(distill.Run(recipe, name, source, runs, stage.contents, stage.key))
    steps = recipe.optim.epochs * plan.steps_per_epoch
    rows["stage 2"] = f"{recipe.optim.epochs} epochs of {plan.steps_per_epoch:,} steps, {steps:,} in all"
    return {**rows, "writes": str(plan.folder), "state": plan.state}


def _print_next_steps(student: Path) -> None:
    from comkd_cli.terminal import output

    path = shlex.quote(str(student))
    output().print(
        f"student: {student}\n  comkd evaluate {path}\n  comkd export --onnx {path}",
        markup=False,
        soft_wrap=True,
    )
