"""`comkd import-student`: a released student as a student.pt."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from comkd_cli.cli.completing import complete_dataset, complete_recipe
from comkd_cli.cli.options import data_root_option, runs_option, typed_command


@click.command()
@click.argument("recipe", shell_complete=complete_recipe)
@click.option(
    "--dataset",
    metavar="NAME",
    shell_complete=complete_dataset,
    help="The dataset that the student was distilled on.",
)
@click.option("--seed", type=click.IntRange(min=0), help="The seed that it was distilled with, which names its folder.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a recipe field, such as student.weights=FILE.",
)
@runs_option
@data_root_option
def command(
    recipe: str, dataset: str | None, seed: int | None, settings: tuple[str, ...], runs: Path, data_root: Path
) -> None:
    """Convert a student of PromptKD's own code to a student.pt.

    Nothing is trained. The student is written to RUNS/<recipe>/<dataset>/seed<k>/student.pt. RECIPE has
    `student: {weights: FILE, format: promptkd}`, the teacher that the student was distilled from (for the class
    vectors), and the data (for the class names). Every other command then accepts the student.pt. Nothing in FILE is
    executed.
    """
    from comkd_cli.cli.resuming import Choice
    from comkd_cli.cli.terminal import output, reporting, starting
    from comkd_cli.files import check_writable
    from comkd_cli.recipe import find_recipe, load_recipe

    loaded = load_recipe(recipe, [*settings, *Choice(dataset, seed).settings()])
    with starting():
        from comkd_cli.cli.distiller import ANOTHER_FOLDER, accelerator_of
        from comkd_cli.data.sources import open_source
        from comkd_cli.flows import adapt
        from comkd_cli.flows.import_student import import_student
        from comkd_cli.runtime import collectives

        accelerator = accelerator_of([loaded])
    name = find_recipe(recipe).stem
    with reporting() as report:
        source = collectives.in_turn(partial(open_source, loaded.data, data_root, runs, report))
        target = runs / name / source.name / f"seed{loaded.seed}" / "student.pt"
        collectives.in_turn(partial(check_writable, target.parent, ANOTHER_FOLDER))
        stage = adapt.stage_1(loaded, source, data_root, runs, report)
        ready = adapt.TeacherPreparation(stage, accelerator, report, typed_command()).prepare()
        import_student(loaded, name, source, ready, target, report)
    output().print(f"student: {target}", markup=False, soft_wrap=True)
    collectives.destroy()
