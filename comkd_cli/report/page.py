"""One HTML page from scored runs: no script, nothing fetched, every name escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from comkd_cli.edge.visible import visible
from comkd_cli.report import details, figures, scores
from comkd_cli.report.findings import findings
from comkd_cli.report.run import ScoredRun
from comkd_cli.report.statistics import calibration
from comkd_cli.results.curve import judge

MOST_DETAILED = 6  # runs that get a section of their own, so that the page of a whole suite stays small
CLASSES_OF_NUMBERS = {True: "right", False: "wrong", None: ""}


@dataclass(frozen=True)
class Section:
    """All that the page shows of one run."""

    number: int
    run: ScoredRun
    rows: Sequence[scores.ScoreRow]
    tiles: Sequence[scores.Tile]
    difference: scores.Difference | None
    findings: Sequence[str]
    verdict: str
    training: Sequence[figures.Figure]
    figures: Sequence[figures.Figure]
    classes: details.ClassTable
    confusion: details.ConfusionTable
    disagreements: Sequence[details.Picture]
    least_certain: Sequence[details.Picture]
    origin: Sequence[tuple[str, str]]
    commands: Sequence[tuple[str, str]]
    settings: str


def render(runs: Sequence[ScoredRun], making: details.Making) -> str:
    """The page. runs: one or more, the first of which the others are compared with."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    beside = scores.compared(runs) if len(runs) > 1 else None
    page = environment.get_template("template.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=[_section(run, number, making) for number, run in enumerate(runs[:MOST_DETAILED], 1)],
        left_out=[run.name for run in runs[MOST_DETAILED:]],
        compared=beside,
        cost_figures=_cost_figures(beside.rows, runs[0].labelled) if beside else (),
        megabytes=scores.weights_megabytes,
        made_by=making.command,
        marks=CLASSES_OF_NUMBERS,
    )
    # Names that are not UTF-8 reach Python as lone surrogates, which no page can hold.
    return visible(page.encode("utf-8", "backslashreplace").decode("utf-8"))


def _section(run: ScoredRun, number: int, making: details.Making) -> Section:
    rows = [scores.score_row(run, role, model, "") for role, model in run.models]
    return Section(
        number=number,
        run=run,
        rows=rows,
        tiles=scores.tiles(run, rows),
        difference=scores.against_teacher(run),
        findings=findings(run),
        verdict=judge(run.history).sentence if run.history else "",
        training=figures.history_figures(run.history, f"run{number}"),
        figures=_figures(run, rows, f"run{number}"),
        classes=details.class_table(run),
        confusion=details.confusion_table(run),
        disagreements=details.disagreements(run),
        least_certain=details.least_certain(run),
        origin=details.origin(run),
        commands=details.commands(run, making),
        settings=details.settings(run),
    )


def _figures(run: ScoredRun, rows: Sequence[scores.ScoreRow], prefix: str) -> list[figures.Figure]:
    """Scores and calibration; none without labels, because it is then not known which answers are right."""
    if not run.labelled:
        return []
    known = {row.name: (row.top1.value, row.top1.interval) for row in rows if row.top1 and row.top1.interval}
    curves = {}
    for role, model in run.models:
        predicted, labels = run.against_reference(model)
        curves[role] = calibration(model.answers.confidence, predicted == labels)
    return [
        figures.score_figure(known, "top-1, percent", f"{prefix}-scores"),
        figures.calibration_figure(curves, prefix),
    ]


def _cost_figures(rows: Sequence[scores.ScoreRow], labelled: bool) -> list[figures.Figure]:
    """Scores against parameters, multiply-adds and latency, as far as these are known."""
    score = "top-1, percent" if labelled else "agreement with the teacher, percent"
    costs = {
        "parameters of the image tower": "parameters",
        "multiply-adds for one image": "multiply_adds",
        "latency of one image on one thread, ms": "latency",
    }
    made = []
    for label, field in costs.items():
        points = [
            figures.Point(row.key, cost.value, row.score.value, row.score.interval, row.role == "teacher")
            for row in rows
            if row.score is not None and row.score.interval is not None and (cost := getattr(row, field)) is not None
        ]
        made.append(figures.cost_figure(points, label, score, f"cost-{field.replace('_', '-')}"))
    return [figure for figure in made if figure is not None]
