"""From records of runs to the statistics of each row, as JSON and as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.ablation.figures import interval
from benchmarks.ablation.rows import Row

Records = Mapping[tuple[str, int], Mapping[str, Any]]
"""Records of finished runs by row and seed."""


def statistics_of(row: Row, records: Records) -> dict[str, Any] | None:
    """A row's figures over its seeds; None where no run is finished."""
    mine = {seed: record["figures"] for (name, seed), record in sorted(records.items()) if name == row.name}
    if not mine:
        return None
    base = {seed: record["figures"] for (name, seed), record in records.items() if name == row.base}
    pairs = sorted(mine.keys() & base.keys()) if row.name != row.base else []
    differences = [mine[seed]["top1_percent"] - base[seed]["top1_percent"] for seed in pairs]
    first = next(iter(mine.values()))
    novel = {"novel_top1_percent": _spread(mine, "novel_top1_percent")} if row.half else {}
    return {
        "study": row.study,
        "row": row.name,
        "seeds": sorted(mine),
        "top1_percent": _spread(mine, "top1_percent"),
        "difference": {
            "to": row.base,
            "seeds": pairs,
            "mean": float(np.mean(differences)) if pairs else None,
            "interval_95": interval(differences),
        },
        **novel,
        "agreement_percent": _spread(mine, "agreement_percent"),
        "calibration_error_percent": _spread(mine, "calibration_error_percent"),
        "gate": None if first["gate"] is None else _spread(mine, "gate"),
        "gradient_shares": {
            term: float(np.mean([figures["gradient_shares"][term] for figures in mine.values()]))
            for term in first["gradient_shares"]
        },
        "parameters": first["parameters"],
        "multiply_adds": first["multiply_adds"],
        "training_minutes": float(
            np.mean([record["training_seconds"] / 60 for (name, _), record in records.items() if name == row.name])
        ),
    }


def _spread(figures: Mapping[int, Mapping[str, Any]], name: str) -> dict[str, float | None]:
    values = [float(each[name]) for each in figures.values()]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The statistics of rows of one study as a table."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "row": lambda row: str(row["row"]),
        "seeds": lambda row: str(len(row["seeds"])),
        "top-1, %": lambda row: _with_deviation(row["top1_percent"]),
        "difference, 95 % interval": lambda row: _difference(row["difference"]),
        "other classes' top-1, %": lambda row: _with_deviation(row["novel_top1_percent"]),
        "agreement, %": lambda row: _with_deviation(row["agreement_percent"]),
        "calibration error, %": lambda row: _with_deviation(row["calibration_error_percent"]),
        "gate": lambda row: "" if row["gate"] is None else f"{row['gate']['mean']:.3f}",
        "gradient shares": lambda row: ", ".join(f"{term} {of:.0%}" for term, of in row["gradient_shares"].items()),
        "parameters": lambda row: f"{row['parameters']:,}",
    }
    if not all("novel_top1_percent" in row for row in rows):
        del columns["other classes' top-1, %"]
    right = {name: name not in ("row", "gradient shares") for name in columns}
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---:' if right[name] else '---' for name in columns)}|",
        *(f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _with_deviation(spread: Mapping[str, float | None]) -> str:
    deviation = spread["deviation"]
    return f"{spread['mean']:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _difference(difference: Mapping[str, Any]) -> str:
    if difference["mean"] is None:
        return ""
    reach = difference["interval_95"]
    return f"{difference['mean']:+.2f}" + (f" ({reach[0]:+.2f} to {reach[1]:+.2f})" if reach else "")


def grid_markdown(grid: Mapping[str, Mapping[str, float]], chosen: Mapping[str, float]) -> str:
    """What the grid of weights found on the validation images, and what it chose."""
    lines = ["| term | validation top-1, % by weight | chosen |", "|---|---|---:|"]
    for term, scores in grid.items():
        found = ", ".join(f"{weight}: {score:.2f}" for weight, score in scores.items())
        lines.append(f"| {term} | {found} | {chosen[term]:g} |")
    return "\n".join(lines) + "\n"
