"""`comkd distill`: teacher to student."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from comkd_cli.cli.options import data_root_option, runs_option
from comkd_cli.runtime import ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from comkd_cli.data.source import Source
    from comkd_cli.events import Report
    from comkd_cli.flows.distill import Outline
    from comkd_cli.recipe import Recipe

ELSEWHERE = "give another folder with --runs"


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
@click.option("--fresh", is_flag=True, help="Start from scratch, discarding any existing run.")
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
    RUNS/<recipe>/<dataset>/seed<k>/student.pt. An interrupted run is resumed; a finished one is not
    repeated. Several GPUs: torchrun --nproc-per-node N -m comkd_cli distill RECIPE.
    """
    from comkd_cli.cli.terminal import messages, starting
    from comkd_cli.files import check_writable
    from comkd_cli.recipe import find_recipe, load_recipe

    if datasets and whole_suite:
        raise click.UsageError("--dataset and --all exclude each other")
    if fresh and precompute:
        raise click.UsageError(
            "--fresh and --precompute exclude each other: crops that are there are not asked for again"
        )
    if whole_suite:
        datasets = _suite_below(data_root)
    choices = list(product(datasets or [None], seeds or [None]))
    loaded = [load_recipe(recipe, [*settings, *_settings(choice)]) for choice in choices]
    if len(precisions := sorted({chosen.precision for chosen in loaded})) > 1:
        raise click.UsageError(f"the data sets differ in precision ({', '.join(precisions)}); run them one at a time")
    name = find_recipe(recipe).stem
    with starting():
        from comkd_cli.errors import CheckpointError, ComkdError, DataError, Interrupted, ModelError
        from comkd_cli.runtime import collectives
        from comkd_cli.training.accelerator import make_accelerator

        collectives.set_timeout(max(chosen.collective_timeout_minutes for chosen in loaded))
        accelerator = make_accelerator(loaded[0].precision)
    told: set[str] = set()  # of a dataset, which every seed opens
    if dry_run:
        for chosen in loaded:
            _print_plan(chosen, name, runs, data_root, accelerator.device.type, told)
        collectives.destroy()
        return
    collectives.in_turn(partial(check_writable, runs, ELSEWHERE))
    problems: list[ComkdError] = []
    for position, chosen in enumerate(loaded):
        repeat = _resume_line(choices, position, fresh, repeats=fresh)
        resume = Resume(repeat, _resume_line(choices, position, fresh))
        try:
            student = _distil(chosen, name, runs, data_root, accelerator, fresh, precompute, resume, told)
        except KeyboardInterrupt:
            if not fresh:
                raise
            raise Interrupted(f"interrupted. To resume:\n  {repeat}") from None
        except (DataError, CheckpointError, ModelError) as error:
            if len(loaded) == 1:
                raise
            messages().print(f"left out: {error}", style="yellow", markup=False)  # the others go on
            problems.append(error)
            continue
        if student is not None:
            _print_next_steps(student)
    collectives.destroy()
    if problems:
        raise DataError(f"{len(problems)} of {len(loaded)} runs could not be made; see the errors above")


class Resume(NamedTuple):
    """The commands that resume a run stopped in one of its stages."""

    teacher: str
    """With --fresh still, which has forgotten nothing of the student before its teacher is ready."""
    student: str


def _distil(
    recipe: Recipe,
    name: str,
    runs: Path,
    data_root: Path,
    accelerator: Accelerator,
    fresh: bool,
    precompute: bool,
    resume: Resume,
    told: set[str],
) -> Path | None:
    """One run. Returns its student.pt; None where it was finished before, or the cache alone was filled."""
    from comkd_cli.cli.terminal import messages, reporting
    from comkd_cli.data.sources import open_source
    from comkd_cli.events import once
    from comkd_cli.files import check_writable
    from comkd_cli.flows import adapt, distill
    from comkd_cli.runtime import collectives
    from comkd_cli.runtime.devices import failures_explained

    with reporting() as report:
        new = once(report, told)
        source = collectives.in_turn(partial(open_source, recipe.data, data_root, runs, new, fetch=True))
        stage = collectives.in_turn(partial(adapt.stage_1, recipe, source, data_root, runs, new))
        with collectives.without_timeout():  # reading the contents of many images takes long
            run = distill.Run(recipe, name, source, runs, stage.contents, stage.key)
            run.identity.digest  # noqa: B018  reads them now
        done = not precompute and not fresh and distill.finished(run, new)
    if done:
        messages().print(f"already finished: {run.student_file} (--fresh repeats it)", markup=False)
        return None
    for folder in (run.folder, stage.folder) if stage.adapts else (run.folder,):
        collectives.in_turn(partial(check_writable, folder, ELSEWHERE))
    with reporting() as report, failures_explained():
        teacher = adapt.TeacherPreparation(stage, accelerator, report, resume.teacher)
        if precompute:
            distill.precompute(run, teacher, accelerator, report)
            return None
        return distill.distill(run, teacher, accelerator, report, resume.student, fresh)


def _suite_below(data_root: Path) -> tuple[str, ...]:
    """The suite's data sets whose folders are there; the others are told."""
    from comkd_cli.cli.terminal import messages
    from comkd_cli.errors import DataError
    from comkd_cli.recipe.catalog import CATALOG
    from comkd_cli.results.tables import ELEVEN

    there = tuple(name for name in ELEVEN if (data_root / CATALOG[name].folder).is_dir())
    if absent := [name for name in ELEVEN if name not in there]:
        messages().print(f"not below {data_root}: {', '.join(absent)} (see `comkd datasets check`)", markup=False)
    if not there:
        raise DataError(f"{data_root}: holds none of the suite's data sets; give --data-root, or fetch one")
    return there


Choice = tuple[str | None, int | None]
"""A data set and a seed, as the command line names them; None where it names none."""


def _settings(choice: Choice) -> list[str]:
    dataset, seed = choice
    named = [] if dataset is None else [f"data.dataset={dataset}"]
    return named if seed is None else [*named, f"seed={seed}"]


def _resume_line(choices: Sequence[Choice], position: int, fresh: bool, repeats: bool = False) -> str:
    """What resumes a command that was stopped in one of its runs: the command as it was typed.

    With --fresh it is several commands: the stopped run without it, lest its state be thrown away (unless it
    `repeats`), and the runs that were not begun with it. Finished runs are not repeated.
    """
    words = sys.argv[1:]
    if not fresh:
        return _command(words)
    rest = [word for word in words if word != "--fresh"]
    if len(choices) == 1:
        return _command(words if repeats else rest)
    rest = _without_choices(rest)
    begun = [] if repeats else [_with_choices(rest, choices[position : position + 1])]
    later = choices[position:] if repeats else choices[position + 1 :]
    grouped = [list(group) for _, group in groupby(later, key=lambda choice: choice[0])]
    # Data sets with the same seeds are one command.
    commands = [
        [choice for group in groups for choice in group]
        for _, groups in ((seeds, list(alike)) for seeds, alike in groupby(grouped, key=_seeds))
    ]
    return " &&\n  ".join(map(_command, [*begun, *(_with_choices(rest, runs, "--fresh") for runs in commands)]))


def _seeds(choices: Sequence[Choice]) -> list[int | None]:
    return [seed for _, seed in choices]


def _without_choices(words: Sequence[str]) -> list[str]:
    """The words of a command less --all, --dataset and --seed."""
    kept: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word in ("--dataset", "--seed"):
            next(remaining, None)
        elif word != "--all" and not word.startswith(("--dataset=", "--seed=")):
            kept.append(word)
    return kept


def _with_choices(words: Sequence[str], choices: Sequence[Choice], *more: str) -> list[str]:
    """The words of a command with options for all of these data sets and seeds; before what `--` may end."""
    datasets = [f"--dataset={name}" for name in dict.fromkeys(name for name, _ in choices) if name is not None]
    seeds = [f"--seed={seed}" for seed in dict.fromkeys(seed for _, seed in choices) if seed is not None]
    at = words.index("distill") + 1 if "distill" in words else 0
    return [*words[:at], *datasets, *seeds, *more, *words[at:]]


def _command(words: Sequence[str]) -> str:
    if ranks.world_size() == 1:
        return shlex.join(["comkd", *words])
    launcher = "torchrun ..." if ranks.on_several_machines() else f"torchrun --nproc-per-node {ranks.per_machine()}"
    return f"{launcher} -m comkd_cli {shlex.join(words)}"


def _print_plan(recipe: Recipe, name: str, runs: Path, data_root: Path, device: str, told: set[str]) -> None:
    """A table of what would run. Images that are not there are a row of it: the models are told all the same.

    told: notices that need not be said again.
    """
    from comkd_cli.cli.terminal import print_pairs, reporting
    from comkd_cli.data.sources import open_source
    from comkd_cli.errors import DataError
    from comkd_cli.events import once
    from comkd_cli.flows import distill
    from comkd_cli.recipe.catalog import CATALOG
    from comkd_cli.runtime import collectives

    rows: dict[str, str] = {}
    try:
        with reporting() as report:
            opened = partial(open_source, recipe.data, data_root, runs, once(report, told))
            source = collectives.in_turn(opened)
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
    together = f", {ranks.world_size()} processes" if ranks.world_size() > 1 else ""
    rows["device"] = f"{device}, {recipe.precision}{together}"
    order = ("images", "teacher", "stage 1", "student", "stage 2", "cache", "device", "writes", "state")
    print_pairs({row: rows[row] for row in order if row in rows})


def _data_rows(
    recipe: Recipe, name: str, runs: Path, data_root: Path, source: Source, outline: Outline, report: Report
) -> dict[str, str]:
    """What the images that are there decide."""
    from comkd_cli.errors import DataError
    from comkd_cli.flows import adapt, distill
    from comkd_cli.teachers.feature_cache import CacheKey

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
    from comkd_cli.cli.terminal import output

    path = shlex.quote(str(student))
    output().print(
        f"student: {student}\n  comkd evaluate {path}\n  comkd export --onnx {path}",
        markup=False,
        soft_wrap=True,
    )
