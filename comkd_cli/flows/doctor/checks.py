"""What a check of this machine found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "error"]
"""With an error, `comkd distill` cannot run."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    state: State = "ok"
    remedy: str = ""
    """What to do; empty if nothing is wrong."""
