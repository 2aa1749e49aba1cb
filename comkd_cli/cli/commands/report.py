"""`comkd report`: one page on a run, or several beside each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comkd_cli.cli.completing import complete_run
from comkd_cli.cli.options import allow_download_option, data_root_option, runs_option, typed_command

if TYPE_CHECKING:
    from comkd_cli.flows.report import RunCollector

STUDENT = "student.pt"


@click.command()
@click.argument(
    "runs_to_show",
    metavar="RUN...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=complete_run,
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write. Default: report.html beside the student, or RUNS/report.html for several runs.",
)
@runs_option
@data_root_option
@allow_download_option
def command(
    runs_to_show: tuple[Path, ...], out: Path | None, runs: Path, data_root: Path, allow_download: bool
) -> None:
    """Write a report of finished runs as one HTML file.

    RUN is a student.pt or its folder. The report shows scores with confidence intervals, costs, the training curve,
    the scores of each class, confusions, and the test images on which student and teacher disagree most. It needs
    no network and runs no script. With several runs, the first is compared with the others: include a run that
    was trained on labels alone (recipe labels_only) to see how much the teacher contributed.

    Features that `comkd evaluate` stored in RUNS/features are reused; other test images are encoded again.
    """
    from comkd_cli.cli.terminal import output, reporting, starting
    from comkd_cli.files import check_writable

    students = [_student_file(path) for path in runs_to_show]
    with starting():
        from comkd_cli.flows.report import NAME, RunCollector
        from comkd_cli.report.details import Making
        from comkd_cli.runtime import collectives

    path = out or (students[0].parent if len(students) == 1 else runs) / NAME
    collectives.in_turn(partial(check_writable, path.parent, "choose another file with --out"))
    with reporting() as report:
        collector = RunCollector(report)
        for student in students:
            _score(student, collector, runs, data_root, allow_download)
        if collector.runs:
            collector.write(path, Making(typed_command(), runs, data_root))
    collectives.destroy()
    output().print(f"report: {path}", markup=False, soft_wrap=True)


def _score(student: Path, collector: RunCollector, runs: Path, data_root: Path, allow_download: bool) -> None:
    from comkd_cli.flows.evaluate import Bench, evaluate
    from comkd_cli.runtime.devices import best_device

    bench = Bench(
        device=best_device(),
        data_root=data_root,
        report=collector.report,
        on_scored=collector.observe,
        features=runs / "features",
        allow_download=allow_download,
    )
    evaluate(str(student), runs, bench, collector.closing())


def _student_file(path: Path) -> Path:
    """The student.pt that a RUN names. Raises DataError, with the runs below it, for a folder that has none."""
    from comkd_cli.errors import DataError

    if not path.exists():
        raise DataError("no such run", path=path, remedy=f"specify a {STUDENT} or its folder")
    if not path.is_dir():
        return path
    if (path / STUDENT).is_file():
        return path / STUDENT
    below = sorted(str(found.parent) for found in path.rglob(STUDENT))
    raise DataError(
        f"holds no {STUDENT}",
        path=path,
        remedy=f"choose one of {', '.join(below[:5])}" if below else "make a run with `comkd distill digits`",
    )
