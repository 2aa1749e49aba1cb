"""`comkd export` as a function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comkd_cli.api.folders import PathLike, data_root_or_default
from comkd_cli.events import Report, ignore_event
from comkd_cli.flows.export import ExportOptions
from comkd_cli.flows.export import export as export_student


@dataclass(frozen=True)
class Bundle:
    """An exported bundle."""

    folder: Path
    manifest: Mapping[str, Any]
    """The content of its manifest.json; docs/bundle.md describes the fields."""
    failed: Mapping[str, str]
    """What was requested and is not in the bundle, such as `int8`, with the reason."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions whose graphs passed their gates."""
        return tuple(self.manifest["precisions"])

    def graph(self, precision: str = "fp32") -> Path:
        """The ONNX file from images to logits in a precision. Raises KeyError for one that is not in the bundle."""
        name: str = self.manifest["precisions"][precision]["classifier"]
        return self.folder / name


def export(
    student: PathLike,
    out: PathLike | None = None,
    *,
    options: ExportOptions | None = None,
    data_root: PathLike | None = None,
    force: bool = False,
    report: Report = ignore_event,
) -> Bundle:
    """Export a student.pt to a bundle of ONNX graphs that are checked in onnxruntime, as `comkd export` does.

    out: a folder; None: `bundle` beside the student. options: what the bundle contains and its gates; None: only fp32.
    force: replace an existing bundle. report: called with each event. A precision that misses its gate is left out and
    is in `failed`. Raises ExportError, with the figures, if none passes, and if `out` exists without `force`.
    """
    file = Path(student)
    folder = file.parent / "bundle" if out is None else Path(out)
    exported = export_student(file, folder, data_root_or_default(data_root), report, force, options)
    return Bundle(folder, exported.manifest, exported.failed)
