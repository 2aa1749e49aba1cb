"""`comkd evaluate` as a function."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comkd_cli.api.folders import RUNS, PathLike, data_root_or_default
from comkd_cli.events import Report, ignore_event
from comkd_cli.flows.evaluate import Bench
from comkd_cli.flows.evaluate import evaluate as score
from comkd_cli.recipe.loading import parse_data
from comkd_cli.results.records import Results
from comkd_cli.results.result_files import add_results
from comkd_cli.runtime.devices import best_device


def evaluate(  # noqa: PLR0913 - each is a keyword of a public function
    model: PathLike | None = None,
    *,
    data: Mapping[str, Any] | str | None = None,
    protocols: Sequence[str] = ("zero-shot",),
    runs: PathLike = RUNS,
    data_root: PathLike | None = None,
    out: PathLike | None = None,
    allow_download: bool = False,
    report: Report = ignore_event,
) -> Results:
    """The scores of a student beside its teacher's, or of a plain CLIP, as `comkd evaluate` reports them.

    model: a student.pt, ARCH:WEIGHTS, or None for the newest students of each dataset below `runs`. data: the images,
    the name of a dataset or the fields of a recipe's `data`, such as `{"folder": "photos"}`; None: the student's own.
    Features are kept in `runs`/features, as by the command. out: a folder to whose results.json the records are added;
    None writes nothing. report: called with each event. Raises ComkdError if nothing could be scored; if only some of
    several students could not be scored, these are entries of `missing`.
    """
    fields = {"dataset": data} if isinstance(data, str) else data
    bench = Bench(
        device=best_device(),
        data_root=data_root_or_default(data_root),
        report=report,
        features=Path(runs) / "features",
        data=None if fields is None else parse_data(fields),
        protocols=tuple(protocols),
        protocols_named=True,
        allow_download=allow_download,
    )
    results = score(None if model is None else os.fspath(model), Path(runs), bench)
    if out is not None:
        add_results(Path(out), results, report)
    return results
