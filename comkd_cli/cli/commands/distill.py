"""`comkd distill`: teacher to student."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comkd_cli.cli.options import data_root_option, runs_option
from comkd_cli.cli.resuming import Choice, StoppedRun

if TYPE_CHECKING:
    from accelerate import Accelerator

    from comkd_cli.data.source import Source
    from comkd_cli.flows.adapt import Stage1
    from comkd_cli.flows.distill import Run
    from comkd_cli.recipe import Recipe

ANOTHER_FOLDER = "give another folder with --runs"


@click.command()
@click.argument("recipe")
@click.option("--dataset", "datasets", metavar="NAME", multiple=True, help="Train on this dataset; may be repeated.")
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
        raise click.UsageError("--dataset and --all exclude each other")
    if fresh and precompute:
        raise click.UsageError("--fresh and --precompute exclude each other: cached crops are never recomputed")
    if whole_suite:
        datasets = _suite_below(data_root)
    choices = [Choice(dataset, seed) for dataset, seed in product(datasets or [None], seeds or [None])]
    recipes = [load_recipe(recipe, [*settings, *choice.settings()]) for choice in choices]
    if len(precisions := sorted({each.precision for each in recipes})) > 1:
        raise click.UsageError(f"the datasets differ in precision ({', '.join(precisions)}); run them one at a time")
    with starting():
        from comkd_cli.runtime import collectives
        from comkd_cli.training.accelerator import make_accelerator

        collectives.set_timeout(max(each.collective_timeout_minutes for each in recipes))
        accelerator = make_accelerator(recipes[0].precision)
    name = find_recipe(recipe).stem
    if dry_run:
        from comkd_cli.cli.dry_run import DryRun

        plan = DryRun(name, runs, data_root, accelerator.device.type)
        for each in recipes:
            plan.print(each)
    else:
        distiller = Distiller(name, runs, data_root, accelerator, precompute=precompute)
        distiller.make_all(recipes, choices, fresh)
    collectives.destroy()


class Distiller:
    """Makes the runs of one command, one after another."""

    def __init__(self, name: str, runs: Path, data_root: Path, accelerator: Accelerator, *, precompute: bool) -> None:
        """name: of the recipe. precompute: fill the teacher cache instead of training students."""
        self._name, self._runs, self._data_root = name, runs, data_root
        self._accelerator = accelerator
        self._precompute = precompute
        self._reported: set[str] = set()  # notices about a dataset, which the run of each seed would repeat

    def make_all(self, recipes: Sequence[Recipe], choices: Sequence[Choice], fresh: bool) -> None:
        """Make a run for each recipe. Of several runs, one that fails does not stop the others.

        choices: the dataset and seed of each recipe. fresh: discard existing runs. Raises DataError after the last
        run where some of several failed, and the error of a run that is the only one.
        """
        from comkd_cli.cli.terminal import messages
        from comkd_cli.errors import CheckpointError, DataError, ModelError
        from comkd_cli.files import check_writable
        from comkd_cli.runtime import collectives

        collectives.in_turn(partial(check_writable, self._runs, ANOTHER_FOLDER))
        failed = 0
        for position, recipe in enumerate(recipes):
            try:
                student = self._make(recipe, StoppedRun(choices, position, fresh))
            except (DataError, CheckpointError, ModelError) as error:
                if len(recipes) == 1:
                    raise
                messages().print(f"failed: {error}", style="yellow", markup=False)
                failed += 1
                continue
            if student is not None:
                _print_next_steps(student)
        if failed:
            raise DataError(f"{failed} of {len(recipes)} runs failed; see the errors above")

    def _make(self, recipe: Recipe, resume: StoppedRun) -> Path | None:
        """One run. Returns its student.pt; None where it was already finished, or only the cache was filled."""
        from comkd_cli.errors import Interrupted

        try:
            prepared = self._prepare(recipe, resume)
            return None if prepared is None else self._train(*prepared, resume)
        except KeyboardInterrupt:
            if not resume.fresh:
                raise  # the same command resumes the run
            raise Interrupted(f"interrupted. To resume:\n  {resume.resume_teacher}") from None

    def _prepare(self, recipe: Recipe, resume: StoppedRun) -> tuple[Run, Stage1] | None:
        """The run and its teacher; None where its student is already finished."""
        from comkd_cli.cli.terminal import messages, reporting
        from comkd_cli.data.sources import open_source
        from comkd_cli.events import once
        from comkd_cli.files import check_writable
        from comkd_cli.flows import adapt, distill
        from comkd_cli.runtime import collectives

        with reporting() as shown:
            report = once(shown, self._reported)
            open_images = partial(open_source, recipe.data, self._data_root, self._runs, report, fetch=True)
            source: Source = collectives.in_turn(open_images)
            stage = collectives.in_turn(partial(adapt.stage_1, recipe, source, self._data_root, self._runs, report))
            with collectives.without_timeout():  # reading the contents of many images takes long
                run = distill.Run(recipe, self._name, source, self._runs, stage.contents, stage.key)
                run.identity.digest  # noqa: B018 - reads the contents, which are kept from then on
            finished = not self._precompute and not resume.fresh and distill.finished(run, report, resume.alone)
        if finished:
            messages().print(f"already finished: {run.student_file} (--fresh repeats it)", markup=False)
            return None
        for folder in (run.folder, stage.folder) if stage.adapts else (run.folder,):
            collectives.in_turn(partial(check_writable, folder, ANOTHER_FOLDER))
        return run, stage

    def _train(self, run: Run, stage: Stage1, resume: StoppedRun) -> Path | None:
        from comkd_cli.cli.terminal import reporting
        from comkd_cli.flows import adapt, distill
        from comkd_cli.runtime.devices import failures_explained

        with reporting() as report, failures_explained():
            teacher = adapt.TeacherPreparation(stage, self._accelerator, report, resume.resume_teacher)
            if self._precompute:
                distill.precompute(run, teacher, self._accelerator, report)
                return None
            return distill.distill(run, teacher, self._accelerator, report, resume.resume_student, resume.fresh)


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
        raise DataError("holds none of the suite's datasets", path=data_root, remedy="give --data-root, or fetch one")
    return found


def _print_next_steps(student: Path) -> None:
    from comkd_cli.cli.terminal import output

    path = shlex.quote(str(student))
    output().print(
        f"student: {student}\n  comkd evaluate {path}\n  comkd export --onnx {path}",
        markup=False,
        soft_wrap=True,
    )
