"""All checks of this machine, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comkd_cli.flows.doctor.checks import Check
from comkd_cli.flows.doctor.machine import check_cores, check_disk, check_memory, check_shared_memory
from comkd_cli.flows.doctor.packages import check_overlaps, check_python, check_requirements, comkd_version
from comkd_cli.flows.doctor.storage import check_cached_weights, check_data_root
from comkd_cli.flows.doctor.torch_build import check_torch


@dataclass(frozen=True)
class Examination:
    """The checks of a machine."""

    checks: Sequence[Check]

    @property
    def errors(self) -> list[Check]:
        """What keeps `comkd distill` from running."""
        return [check for check in self.checks if check.state == "error"]

    def document(self) -> dict[str, Any]:
        """Plain data, for a bug report."""
        return {
            "comkd": comkd_version(),
            "can_run": not self.errors,
            "checks": [asdict(check) for check in self.checks],
        }


def examine(runs: Path, data_root: Path) -> Examination:
    """Look at this machine. runs: the folder of all runs, which need not exist. data_root: the folder of datasets.

    torch is imported, and computes, in a process of its own: a build that does not fit the machine can crash it.
    Nothing is downloaded, and nothing is left on the disk.
    """
    return Examination(
        [
            check_python(),
            *check_requirements(),
            *check_overlaps(),
            *check_torch(),
            check_cores(),
            check_memory(),
            *check_shared_memory(),
            check_disk(runs),
            check_data_root(data_root),
            check_cached_weights(),
        ]
    )
