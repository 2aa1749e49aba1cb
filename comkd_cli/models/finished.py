"""The finished students below a folder of runs, and the facts that an evaluation needs before it loads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from comkd_cli.errors import ComkdError
from comkd_cli.models.checkpoints import load_student_record
from comkd_cli.runtime import collectives, ranks


def is_student(model: str) -> bool:
    """Whether a model to score is a student.pt, not ARCH:WEIGHTS."""
    return Path(model).exists() or (model.endswith(".pt") and ":" not in model)


def newest_students(runs: Path) -> dict[str, list[Path]]:
    """For each dataset, by name, the students of all seeds of the recipe that was finished last on it."""
    found = sorted(runs.glob("*/*/seed*/student.pt"), key=lambda path: path.stat().st_mtime)
    newest = {path.parent.parent.name: path.parent.parent for path in found}
    return {name: sorted(folder.glob("seed*/student.pt")) for name, folder in newest.items()}


def timeout_minutes(model: str | None, runs: Path) -> float:
    """How long processes wait for one another: the longest `collective_timeout_minutes` of the students to score.

    Of students that could not be read, and of a plain CLIP, the default.
    """
    students: Iterable[Path] = (path for seeds in newest_students(runs).values() for path in seeds)
    if model is not None:
        students = [Path(model)] if is_student(model) else []
    found = []
    for path in students if ranks.world_size() > 1 else ():
        try:
            found.append(load_student_record(path).recipe.collective_timeout_minutes)
        except (ComkdError, OSError):  # reported when it is scored
            continue
    return max(found, default=collectives.DEFAULT_TIMEOUT_MINUTES)
