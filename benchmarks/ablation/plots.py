"""Draw the study's figures from its results.

    python -m benchmarks.ablation.plots STUDY/ablation.json FOLDER [LATENCY.json]

Writes FOLDER/objectives.svg, the top-1 of every seed of each objective beside the mean; FOLDER/images.svg, the mean
over seeds by the number of unlabelled images at equal epochs; and FOLDER/size.svg, the mean by the student's
parameters, multiply-adds and, with LATENCY.json of `benchmarks.ablation.latency`, latency in int8. A figure without a
finished run is left out. The same results give the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

from benchmarks.ablation.latency import row_of
from benchmarks.ablation.pairs import CIFAR10
from benchmarks.ablation.rows import BEST

NAMES = {
    "refinement": "refinement (PromptKD)",
    "refinement_if_align": "+ IFAlign",
    "refinement_edu_attention": "+ EduAttention",
    "comkd": "+ both (ComKD)",
    "refinement_labels": "refinement + labels",
    "refinement_feature_cosine": "refinement + feature cosine",
    "feature_cosine": "feature cosine alone",
    "labels": "labels alone",
}
MARKERS = {"refinement": "o", "comkd": "s", "feature_cosine": "^", "labels": "D"}
AT_EQUAL_EPOCHS = re.compile(r"(?P<objective>.+)_(?P<images>\d+)_equal_epochs")
LATENCY = "int8, one image on one thread"
MOST_IMAGES = CIFAR10.image_counts[-1]  # of the table of objectives
# Legible on a white and on a dark page.
INK = "#808890"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "comkd",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def scores_of(document: Mapping[str, Any], study: str) -> dict[str, list[float]]:
    """Test top-1 in percent of each finished run of a study, by row; the seeds in order."""
    found: dict[str, list[float]] = {}
    for run in sorted(document["runs"], key=lambda run: run["seed"]):
        if run["study"] == study:
            found.setdefault(run["row"], []).append(run["figures"]["top1_percent"])
    return found


def objectives(scores: Mapping[str, Sequence[float]]) -> Figure:
    """A line for each objective: its seeds as points, their mean as a bar."""
    names = [name for name in NAMES if name in scores]
    figure = Figure(figsize=(7, 0.45 * len(names) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        values = scores[name]
        axes.plot(values, [place] * len(values), "o", color="#1f9e89", alpha=0.7)
        axes.plot([sum(values) / len(values)], [place], "|", color="#d1495b", markersize=18, markeredgewidth=2)
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("test top-1, %: each seed a point, their mean a bar")
    axes.grid(axis="x")
    return figure


def images(scores: Mapping[str, Sequence[float]], whole: Mapping[str, Sequence[float]]) -> Figure:
    """Mean top-1 by the number of images, a line for each objective.

    scores: of the study `images`. whole: of the study `objectives`, the right end of each line.
    """
    lines: dict[str, dict[int, float]] = {}
    for row, values in scores.items():
        if found := AT_EQUAL_EPOCHS.fullmatch(row):
            lines.setdefault(found["objective"], {})[int(found["images"])] = sum(values) / len(values)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        if name in whole:
            points[MOST_IMAGES] = sum(whole[name]) / len(whole[name])
        counts = sorted(points)
        axes.plot(counts, [points[count] for count in counts], f"{MARKERS.get(name, 'x')}-", label=NAMES[name])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({count for points in lines.values() for count in points})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training images, 8 epochs")
    axes.set_ylabel("test top-1, %")
    axes.grid()
    axes.legend()
    return figure


def sizes(document: Mapping[str, Any], seconds: Mapping[str, float]) -> Figure:
    """Mean top-1 by each cost of a student, a point for each objective, and the teacher's top-1.

    seconds: of an image in int8, by the name of the student; without them that cost is left out.
    """

    def figures_of(row: str) -> list[Mapping[str, Any]]:
        return [run["figures"] for run in document["runs"] if run["row"] == row]

    costs: dict[str, Callable[[str, Mapping[str, Any]], float | None]] = {
        "parameters": lambda _, figures: float(figures["parameters"]),
        "multiply-adds": lambda _, figures: float(figures["multiply_adds"]),
        LATENCY: lambda student, _: seconds.get(student),
    }
    if not seconds:
        del costs[LATENCY]
    figure = Figure(figsize=(3.1 * len(costs) + 0.7, 3.4), layout="constrained")
    for axes, (label, cost) in zip(figure.subplots(1, len(costs), sharey=True), costs.items(), strict=True):
        for objective in (BEST, "labels"):
            points = {
                student: (of_student, float(np.mean([each["top1_percent"] for each in figures])))
                for student in CIFAR10.students
                if (figures := figures_of(row_of(student, objective)))
                and (of_student := cost(student, figures[0])) is not None
            }
            xs, ys = zip(*sorted(points.values()), strict=True) if points else ((), ())
            axes.plot(xs, ys, MARKERS[objective], label=NAMES[objective])
            if objective == BEST:
                _name_points(axes, points)
        axes.axhline(figures_of(BEST)[0]["teacher_top1_percent"], color=INK, linestyle="--", label="teacher")
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(unit="s" if label == LATENCY else "", sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label)
        axes.grid()
    figure.axes[0].set_ylabel("test top-1, %")
    figure.axes[0].legend(loc="lower right")
    return figure


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each student's name above its point; higher where its left neighbour's name would overlap it."""
    neighbour = (0.0, 0.0)
    for student, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        overlaps = x < 1.5 * neighbour[0] and abs(y - neighbour[1]) < 3
        above = (0, 16 if overlaps else 6)
        name = student.replace("_", " ")
        axes.annotate(name, (x, y), above, textcoords="offset points", ha="center", fontsize=8)
        neighbour = x, y


def main() -> None:
    """Read the results and write the figures."""
    source, folder, *measured = map(Path, sys.argv[1:])
    document = json.loads(source.read_text(encoding="utf-8"))
    latency = [json.loads(path.read_text(encoding="utf-8")) for path in measured]
    seconds = {name: size["seconds"]["int8"] for each in latency for name, size in each["sizes"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    whole = scores_of(document, "objectives")
    with matplotlib.rc_context(STYLE):
        figures = {"objectives": objectives(whole)}
        if scores := scores_of(document, "images"):
            figures["images"] = images(scores, whole)
        if BEST in whole:
            figures["size"] = sizes(document, seconds)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
