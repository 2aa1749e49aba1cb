"""Our scores beside a published row, figure by figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from comkd_cli.results.published import BASE_TO_NOVEL, CROSS_DATASET, DOMAIN_GENERALIZATION, Halves
from comkd_cli.results.records import Record
from comkd_cli.results.tables import ELEVEN, VARIANTS, Table, harmonic_mean

Protocol = Literal["base-to-novel", "cross-dataset", "domain-generalization"]
Method = Literal["comkd", "promptkd"]
Role = Literal["student", "teacher"]

DATASETS: dict[str, tuple[str, ...]] = {
    "base-to-novel": ELEVEN,
    "cross-dataset": ELEVEN[1:],
    "domain-generalization": VARIANTS,
}
COMKD, PROMPTKD = "ComKD-CLIP ViT-B/16 (published)", "PromptKD ViT-B/16 (published)"
TEACHER = "PromptKD's teacher ViT-L/14 (published)"
# ComKD-CLIP's own cells are nearly all unknown to this project, so its students are also compared with PromptKD's.
STUDENTS: dict[str, tuple[str, ...]] = {"comkd": (COMKD, PROMPTKD), "promptkd": (PROMPTKD,)}
AVERAGE, HARMONIC, TOP1 = "average", "harmonic mean", "top-1"
HALVES = ("base", "new")
# Halves that are rounded to 0.01 move their harmonic mean by up to 0.005, and it is itself rounded.
ROUNDING_POINTS = 0.0101
MARK = "*"
MARK_NOTE = "* differs from the harmonic mean of the published halves: "


@dataclass(frozen=True)
class Cell:
    """One published figure, in percent, and ours."""

    dataset: str
    """A dataset, or `average`."""
    figure: str
    """`base`, `new`, `harmonic mean` or `top-1`."""
    published: float | None
    """None if it was not published, or is not known to this project."""
    ours: float | None
    """The mean over seeds; None if nothing was scored."""
    spread: float | None = None
    """The population standard deviation over seeds; None for a single seed and for figures that are derived."""
    seeds: tuple[int, ...] = ()
    published_halves_give: float | None = None
    """The harmonic mean of the published halves, if the published one differs from it by more than rounding."""

    @property
    def difference(self) -> float | None:
        """Ours minus the published one, in points."""
        return None if self.ours is None or self.published is None else self.ours - self.published


@dataclass(frozen=True)
class Comparison:
    """A published row of a protocol, and ours."""

    protocol: Protocol
    role: Role
    published: str
    """The name of the published row."""
    cells: tuple[Cell, ...]
    selection: str = "last"
    """How the epoch of our students was selected."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why a dataset has no figures of ours, or not those of every seed."""

    def as_plain(self) -> dict[str, Any]:
        """Plain data for JSON: the cells with their differences."""
        cells = [{**asdict(cell), "seeds": list(cell.seeds), "difference": cell.difference} for cell in self.cells]
        return {**asdict(self), "reasons": dict(self.reasons), "cells": cells}


def compare(
    protocol: Protocol,
    method: Method,
    records: Sequence[Record],
    datasets: Sequence[str],
    reasons: Mapping[str, str],
) -> list[Comparison]:
    """Our records beside the published students of a method, and beside the published teacher.

    records: only those of this reproduction. datasets: those that it covers, in order. reasons: why one of them has no
    figures, or not those of every seed.
    """
    rows: list[tuple[Role, str]] = [("student", name) for name in STUDENTS[method]]
    if TEACHER in _published_rows(protocol):
        rows.append(("teacher", TEACHER))
    found = []
    for role, name in rows:
        if name not in _published_rows(protocol):
            continue
        own = [record for record in records if record.role == role and record.protocol == protocol]
        if protocol == "base-to-novel":
            cells = _halves_cells(own, datasets, name)
        else:
            cells = _cells(own, datasets, _published_rows(protocol)[name], DATASETS[protocol])
        selection = next((record.selection for record in own), "last")
        found.append(Comparison(protocol, role, name, tuple(cells), selection, dict(reasons)))
    return found


def table_of(comparison: Comparison) -> Table:
    """A comparison as a table: a row for each dataset, three columns for each figure."""
    figures = tuple(dict.fromkeys(cell.figure for cell in comparison.cells))
    heads = ["data"]
    for name in figures:
        heads += [name, f"{name} ours", f"{name} difference"]
    rows = []
    for dataset in dict.fromkeys(cell.dataset for cell in comparison.cells):
        row = [dataset]
        for cell in (cell for cell in comparison.cells if cell.dataset == dataset):
            row += [_published_text(cell), _ours_text(cell), _difference_text(cell)]
        rows.append((*row, comparison.reasons.get(dataset, "")))
    marked = [cell for cell in comparison.cells if cell.published_halves_give is not None]
    note = MARK_NOTE + "; ".join(f"{cell.dataset} {cell.published_halves_give:.2f}" for cell in marked)
    selected = "" if comparison.selection == "last" else ", selected on test"
    title = f"{comparison.protocol}: our {comparison.role} beside {comparison.published}, top-1 %{selected}"
    return Table(title, (*heads, "note"), tuple(rows), note if marked else "")


def inconsistency(halves: Halves) -> float | None:
    """The harmonic mean of published halves, if the published one does not follow from them; else None."""
    if halves.base is None or halves.new is None or halves.harmonic is None:
        return None
    found = harmonic_mean(halves.base, halves.new)
    return found if abs(found - halves.harmonic) > ROUNDING_POINTS else None


def _published_rows(protocol: Protocol) -> Mapping[str, Any]:
    tables: dict[str, Mapping[str, Any]] = {
        "base-to-novel": BASE_TO_NOVEL,
        "cross-dataset": CROSS_DATASET,
        "domain-generalization": DOMAIN_GENERALIZATION,
    }
    return tables[protocol]


def _halves_cells(records: Sequence[Record], datasets: Sequence[str], name: str) -> Iterable[Cell]:
    published = BASE_TO_NOVEL[name]
    unknown = Halves(None, None, None)
    means: list[tuple[float, float]] = []
    for dataset in datasets:
        halves = published.get(dataset, unknown)
        own = [_mean_cell(records, dataset, half, getattr(halves, half), half) for half in HALVES]
        yield from own
        base, new = (cell.ours for cell in own)
        both = None
        if base is not None and new is not None:
            means.append((base, new))
            both = harmonic_mean(base, new)
        seeds = tuple(seed for seed in own[0].seeds if seed in own[1].seeds)
        yield Cell(dataset, HARMONIC, halves.harmonic, both, None, seeds, inconsistency(halves))
    # The published rule: the harmonic mean of the mean base and the mean new.
    halves = published.get(AVERAGE, unknown)
    complete = set(datasets) == set(ELEVEN) and len(means) == len(ELEVEN)
    averages = [statistics.fmean(column) for column in zip(*means, strict=True)] if complete else [None, None]
    for half, ours in zip(HALVES, averages, strict=True):
        yield Cell(AVERAGE, half, getattr(halves, half), ours)
    ours = harmonic_mean(*averages) if complete else None
    yield Cell(AVERAGE, HARMONIC, halves.harmonic, ours, published_halves_give=inconsistency(halves))


def _cells(
    records: Sequence[Record], datasets: Sequence[str], published: Mapping[str, float], every: Sequence[str]
) -> Iterable[Cell]:
    """every: the datasets of the protocol, without one of which there is no average."""
    cells = [_mean_cell(records, dataset, "all", published.get(dataset), TOP1) for dataset in datasets]
    yield from cells
    ours = [cell.ours for cell in cells if cell.ours is not None]
    complete = set(datasets) == set(every) and len(ours) == len(datasets)
    yield Cell(AVERAGE, TOP1, published.get(AVERAGE), statistics.fmean(ours) if complete else None)


def _mean_cell(records: Sequence[Record], dataset: str, half: str, published: float | None, figure: str) -> Cell:
    """The mean over seeds of a dataset's scores on a half of its classes, or on all of them."""
    found = [r for r in records if r.dataset == dataset and r.classes == half and r.top1_percent is not None]
    scores = [record.top1_percent for record in found if record.top1_percent is not None]
    if not scores:
        return Cell(dataset, figure, published, None)
    seeds = tuple(sorted(record.seed for record in found if record.seed is not None))
    return Cell(
        dataset,
        figure,
        published,
        statistics.fmean(scores),
        statistics.pstdev(scores) if len(scores) > 1 else None,
        seeds,
    )


def _published_text(cell: Cell) -> str:
    if cell.published is None:
        return ""
    return f"{cell.published:.2f}" + ("" if cell.published_halves_give is None else MARK)


def _ours_text(cell: Cell) -> str:
    if cell.ours is None:
        return ""
    return f"{cell.ours:.2f}" + ("" if cell.spread is None else f" ± {cell.spread:.2f}")


def _difference_text(cell: Cell) -> str:
    return "" if cell.difference is None else f"{cell.difference:+.2f}"
