"""Python and the installed packages, compared with what comkd requires."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from packaging.requirements import Requirement

from comkd_cli.flows.doctor.checks import Check

DISTRIBUTION = "comkd"
# Distributions that install the same module, so that one overwrites files of the other.
OVERLAPPING = (
    ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    ("pillow", "pillow-simd"),
)


def comkd_version() -> str | None:
    """The version of the installed comkd; None if it runs from a folder that is not installed."""
    return _version(DISTRIBUTION)


def check_python() -> Check:
    """The interpreter and the system."""
    bits = "64-bit" if sys.maxsize > 2**32 else "32-bit"
    found = f"{platform.python_version()}, {bits}, {platform.system()} {platform.machine()}, {sys.prefix}"
    if bits == "32-bit":
        return Check("python", found, "error", "install a 64-bit Python: torch has no 32-bit build")
    return Check("python", found)


def check_requirements() -> list[Check]:
    """The packages that comkd requires: one row if all are installed, otherwise one for each that is not."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [Check("packages", f"{DISTRIBUTION} is not installed", "warning", "install it: pip install comkd")]
    requirements = [Requirement(line) for line in lines]
    needed = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    faults = [check for each in needed if (check := _check_requirement(each)) is not None]
    if faults:
        return faults
    return [Check("packages", f"comkd {comkd_version()} and the {len(needed)} packages that it requires")]


def check_overlaps() -> list[Check]:
    """Installed packages that overwrite each other's files."""
    checks = []
    for names in OVERLAPPING:
        found = [name for name in names if _version(name) is not None]
        if len(found) > 1:
            remedy = f"keep one: pip uninstall {' '.join(found)}, then install it again"
            checks.append(Check("packages", f"{' and '.join(found)} overwrite each other's files", "warning", remedy))
    return checks


def _check_requirement(requirement: Requirement) -> Check | None:
    """The fault of a required package; None if it has none."""
    found = _version(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return None
    problem = "is not installed" if found is None else f"{found} is installed"
    found_text = f"{requirement.name}{requirement.specifier}: {problem}"
    return Check("packages", found_text, "error", f"pip install '{requirement.name}{requirement.specifier}'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
