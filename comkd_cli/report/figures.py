"""The report's figures: SVG that takes its colours from the page, so that it is legible in either colour scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from comkd_cli.report.statistics import Calibration, Interval
from comkd_cli.results.curve import score_name

# Colours that stand for the page's own; matplotlib writes them into the SVG, and `_svg` replaces them.
INK, QUIET, LINE = "#010101", "#020202", "#030303"
SERIES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404")
VARIABLES = {INK: "var(--text)", QUIET: "var(--quiet)", LINE: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)
}
MARKERS, DASHES = ("o", "s", "^", "D"), ("-", "--", "-.", ":")
LABEL_OFFSETS = (6, 5), (-11, -12)  # points; neighbours in turn, so that letters of near points stay apart
WIDTH, HEIGHT = 3.9, 2.5  # inches; on a phone a point is about a pixel
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "comkd",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
}
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Figure:
    """A figure with what it shows in words."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Point:
    """A run in a figure of score against cost."""

    letter: str
    cost: float
    score: float
    interval: Interval
    is_teacher: bool = False


def history_figures(history: Sequence[Mapping[str, Any]], prefix: str) -> list[Figure]:
    """Loss, shares of the terms, held-out score and EduAttention's gate over the epochs, as far as they were measured.

    prefix: of the ids in the SVG, which must be unique within a page.
    """
    if not history:
        return []
    shared = [name for name in history[0] if name.endswith("_gradient_share")]
    terms = _terms(history)
    drawn = [_lines(history, {"loss": "loss"} | dict.fromkeys(terms), f"{prefix}-loss", "Training loss", "loss")]
    if score := score_name(history):
        label = "top-1" if "top1" in score else "agreement"
        drawn.append(_lines(history, {score: label}, f"{prefix}-score", f"Held-out {label}", "percent"))
    if len(shared) > 1:
        names = {name: name.removesuffix("_gradient_share") for name in shared}
        drawn.append(_lines(history, names, f"{prefix}-shares", "Share of each term in the gradient", "share"))
    elif len(terms) > 1:
        shares = [{"epoch": e["epoch"]} | {t: e[t] / e["loss"] for t in terms if t in e and e["loss"]} for e in history]
        title = "Share of each term in the loss"
        drawn.append(_lines(shares, dict.fromkeys(terms), f"{prefix}-shares", title, "share"))
    if any("gate" in epoch for epoch in history):
        drawn.append(_lines(history, {"gate": "gate"}, f"{prefix}-gate", "EduAttention's gate", "gate"))
    return [figure for figure in drawn if figure is not None]


def calibration_figure(curves: Mapping[str, Calibration], prefix: str) -> Figure:
    """Accuracy against confidence, a line for each model."""
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas(HEIGHT * 1.15)
        axes.plot([0, 100], [0, 100], color=QUIET, linewidth=1, linestyle=":", label="ideal")
        for number, (name, curve) in enumerate(curves.items()):
            total = sum(part.images for part in curve.bins)
            at = ([100 * part.confidence for part in curve.bins], [100 * part.accuracy for part in curve.bins])
            sizes = [8 + 150 * part.images / total for part in curve.bins]
            line = _series(number) | {"linewidth": 1}
            axes.plot(*at, label=name, **line)
            axes.scatter(*at, sizes, color=line["color"], marker=line["marker"])
        axes.set(xlabel="confidence, percent", ylabel="right, percent", xlim=(0, 102), ylim=(0, 102))
        axes.legend(loc="upper left")
        errors = ", ".join(f"{name} {curve.expected_error_percent:.2f} %" for name, curve in curves.items())
        caption = f"Calibration: large marks stand for many images. Expected calibration error: {errors}."
        return Figure(_svg(canvas, f"{prefix}-calibration", caption), caption)


def score_figure(scores: Mapping[str, tuple[float, Interval]], score: str, name: str) -> Figure:
    """Scores with their intervals, a line each. score: what they are, with its unit."""
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas(0.75 + 0.38 * len(scores))
        for number, (value, interval) in enumerate(scores.values()):
            spread = [[max(0.0, value - interval.low)], [max(0.0, interval.high - value)]]
            line = _series(number) | {"linestyle": "none", "markersize": 6}
            axes.errorbar([value], [number], xerr=spread, capsize=3, elinewidth=1.4, **line)
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set(xlabel=score, ylim=(len(scores) - 0.4, -0.6))
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.grid(visible=False, axis="y")
        told = "; ".join(
            f"{who} {value:.2f} ({interval.low:.1f} to {interval.high:.1f})"
            for who, (value, interval) in scores.items()
        )
        caption = f"{score[:1].upper()}{score[1:]}, with 95 % intervals: {told}."
        return Figure(_svg(canvas, name, caption), caption)


def cost_figure(points: Sequence[Point], cost: str, score: str, name: str) -> Figure | None:
    """Scores with their intervals against a cost on a logarithmic axis, each point with its letter in the table.

    cost, score: with their units. None if there are no points.
    """
    if not points:
        return None
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas()
        for number, point in enumerate(points):
            colour = SERIES[1] if point.is_teacher else SERIES[0]
            spread = [[point.score - point.interval.low], [point.interval.high - point.score]]
            spread = [[max(0.0, value) for value in side] for side in spread]
            marker = "s" if point.is_teacher else "o"
            axes.errorbar([point.cost], [point.score], yerr=spread, fmt=marker, color=colour, capsize=3, linewidth=1.2)
            axes.annotate(
                point.letter,
                (point.cost, point.score),
                LABEL_OFFSETS[number % 2],
                textcoords="offset points",
                color=INK,
            )
        axes.set_xscale("log")
        _plain_log(axes.xaxis, EngFormatter(sep=""))
        axes.margins(x=0.18, y=0.18)
        axes.set(xlabel=cost, ylabel=score)
        caption = f"{score[:1].upper()}{score[1:]} against {cost}. Letters as in the table; bars are 95 % intervals."
        return Figure(_svg(canvas, name, caption), caption)


def _terms(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The terms of the loss: figures of the first epoch that have a share in the gradient, or that sum to the loss."""
    first = history[0]
    named = [name.removesuffix("_gradient_share") for name in first if name.endswith("_gradient_share")]
    known = ("refinement", "if_align", "feature_mse", "feature_cosine", "labels")
    return named or [name for name in known if name in first]


def _lines(
    history: Sequence[Mapping[str, Any]], names: Mapping[str, str | None], name: str, title: str, unit: str
) -> Figure | None:
    """Figures over the epochs, a line each. names: of the figures, to their labels; None uses the name itself."""
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas()
        drawn: list[str] = []
        values: list[float] = []
        for number, (key, label) in enumerate(names.items()):
            found = [(epoch["epoch"], epoch[key]) for epoch in history if epoch.get(key) is not None]
            if found:
                axes.plot(*zip(*found, strict=True), label=label or key, **_series(number, markers=len(found) <= 12))
                drawn.append(f"{label or key} {found[0][1]:.3g} to {found[-1][1]:.3g}")
                values += [value for _, value in found]
        if not drawn:
            return None
        if unit == "loss" and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
            _plain_log(axes.yaxis, StrMethodFormatter("{x:g}"))
        elif unit == "share":
            axes.set_ylim(0, 1.02)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if len(drawn) > 1:
            axes.legend(loc="best")
        caption = f"{title} over the epochs: {'; '.join(drawn)}."
        return Figure(_svg(canvas, name, caption), caption)


def _plain_log(axis: Axis, formatter: Formatter) -> None:
    """Ticks of a logarithmic axis as short numbers without exponents, at least two of them."""
    low, high = sorted(axis.get_view_interval())
    steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def _canvas(height: float = HEIGHT) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    return canvas, canvas.add_subplot()


def _series(number: int, markers: bool = True) -> dict[str, Any]:
    """A line that differs from the others in more than its colour."""
    kind = number % len(SERIES)
    return {
        "color": SERIES[kind],
        "linestyle": DASHES[kind],
        "linewidth": 1.8,
        "marker": MARKERS[kind] if markers else None,
        "markersize": 4,
    }


def _svg(canvas: Canvas, name: str, description: str) -> Markup:
    """The figure as an element for the page, with ids of its own and a description for readers who cannot see it."""
    stream = io.BytesIO()
    canvas.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue().decode("utf-8")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in [child for child in parent if child.tag == f"{{{SVG}}}metadata"]:
            parent.remove(child)
        for key, value in parent.attrib.items():
            if key == "id":
                parent.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href":
                parent.set(key, value.replace("#", f"#{name}-", 1))
            else:
                parent.set(key, re.sub(r"url\(#", f"url(#{name}-", value))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", description)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))
