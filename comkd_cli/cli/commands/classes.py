"""`comkd classes`: the classes of a student, and new ones by name."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from comkd_cli.cli.completing import complete_student
from comkd_cli.cli.options import allow_download_option, json_option


@click.command()
@click.argument("student", type=click.Path(dir_okay=False, path_type=Path), shell_complete=complete_student)
@click.option("--add", "names", multiple=True, metavar="NAME", help="Add this class; may be repeated.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the new student. Default: `student-classes.pt` beside STUDENT.",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    help="Prompt of the new classes, with {} for the name; several are averaged. Default: those of STUDENT's run.",
)
@click.option("--force", is_flag=True, help="Replace an existing file; it may be STUDENT itself.")
@allow_download_option
@json_option
def command(  # noqa: PLR0913 - click passes each option as a parameter
    student: Path,
    names: tuple[str, ...],
    out: Path | None,
    templates: tuple[str, ...],
    force: bool,
    allow_download: bool,
    as_json: bool,
) -> None:
    """List the classes of STUDENT.pt, or add classes by name.

    A class that is added with --add gets a vector from the text encoder of the student's teacher; nothing is trained.
    The new student is written to a separate file, for `comkd evaluate` and `comkd export`. For each new class, the most
    similar one is printed: above a cosine of 0.98 the student can hardly tell them apart.
    """
    from comkd_cli.cli.terminal import output, print_json, reporting, starting

    if not names:
        if out is not None or templates or force:
            raise click.UsageError("--out, --template and --force need --add")
        with starting():
            from comkd_cli.flows.classes import list_classes
        record = list_classes(student)
        if as_json:
            print_json({"classes": list(record.class_names), "classes_added": list(record.classes_added)})
            return
        for name in record.class_names:
            mark = " (added)" if name in record.classes_added else ""
            output().print(f"{name}{mark}", markup=False, soft_wrap=True)
        return
    with starting():
        from comkd_cli.flows.classes import AddOptions, add_classes
    with reporting(quiet=as_json) as report:
        target, added = add_classes(student, names, AddOptions(out, templates, force, allow_download), report)
    if as_json:
        entries = [{"class": entry.class_name, "nearest": entry.nearest, "cosine": entry.cosine} for entry in added]
        print_json({"student": str(target), "classes_added": entries})
        return
    for entry in added:
        line = f"{entry.class_name}: nearest is {entry.nearest}, cosine {entry.cosine:.4f}"
        output().print(line, markup=False, soft_wrap=True)
    path = shlex.quote(str(target))
    output().print(f"student: {target}\n  comkd evaluate {path}\n  comkd export {path}", markup=False, soft_wrap=True)
