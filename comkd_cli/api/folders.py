"""The default folders of the Python functions: those of the commands."""

from __future__ import annotations

import os
from pathlib import Path

PathLike = str | os.PathLike[str]

RUNS = Path("runs")


def data_root_or_default(data_root: PathLike | None) -> Path:
    """A folder of datasets; None: that of the environment variable COMKD_DATA, or `data`."""
    return Path(os.environ.get("COMKD_DATA") or "data") if data_root is None else Path(data_root)
