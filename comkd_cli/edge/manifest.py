"""A bundle's manifest and its files, each checked before it is used."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from comkd_cli.edge.images import Preprocessing, checked_preprocessing

BUNDLE_FORMAT = "comkd-bundle/1"
EXPORT_AGAIN = "export the bundle again"


class BundleProblem(Exception):
    """A bundle that cannot be used: a file is missing, changed or not what the manifest says.

    Its fields and its text are those of ComkdError, which predict.py cannot import.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: object = None,
        field: str | None = None,
        found: object = None,
        allowed: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.path, self.field, self.remedy = problem, path, field, remedy
        self.found, self.allowed = found, allowed

    def __str__(self) -> str:
        """`path: field: problem: found (allowed: a, b); remedy`, without the fields that are None."""
        text = ": ".join(str(part) for part in (self.path, self.field, self.problem, self.found) if part is not None)
        text += "" if self.allowed is None else f" (allowed: {self.allowed})"
        return text if self.remedy is None else f"{text}; {self.remedy}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, with the fields that every reader needs. Raises BundleProblem."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleProblem("is not a bundle: it has no manifest.json", path=folder) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleProblem(f"could not be read: {error}", path=path) from error
    if isinstance(manifest, dict) and _is_newer(manifest.get("format")):
        raise BundleProblem(
            "was written by a newer comkd",
            path=path,
            field="format",
            found=manifest["format"],
            allowed=BUNDLE_FORMAT,
            remedy="upgrade comkd, or run the bundle's own predict.py",
        )
    if not isinstance(manifest, dict) or manifest.get("format") != BUNDLE_FORMAT:
        raise BundleProblem(f"is not a manifest of format {BUNDLE_FORMAT}", path=path)
    if missing := {"preprocessing", "files", "precisions"} - set(manifest):
        raise BundleProblem("missing", path=path, field=", ".join(sorted(missing)))
    precisions = manifest["precisions"]
    if not isinstance(precisions, dict) or not precisions or not all(isinstance(p, dict) for p in precisions.values()):
        raise BundleProblem("should name the graphs of at least one precision", path=path, field="precisions")
    return manifest


def _is_newer(found: object) -> bool:
    """Whether a manifest's format is a later version of BUNDLE_FORMAT; as files.is_newer_format."""
    kind, _, version = str(found).rpartition("/")
    own_kind, _, own_version = BUNDLE_FORMAT.rpartition("/")
    is_number = version.isascii() and version.isdigit() and len(version) < 10
    return kind == own_kind and is_number and int(version) > int(own_version)


def read_preprocessing(folder: Path, manifest: dict[str, Any]) -> Preprocessing:
    """The pre-processing of a manifest. Raises BundleProblem."""
    try:
        return checked_preprocessing(manifest["preprocessing"])
    except ValueError as error:
        raise BundleProblem(str(error), path=folder / "manifest.json", field="preprocessing") from error


def verified_bytes(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    """The content of a bundle's file, whose sha256 must be that of the manifest. Raises BundleProblem."""
    path = folder / name
    try:
        sha256 = manifest["files"][name]["sha256"]
    except (KeyError, TypeError) as error:
        raise BundleProblem(f"has no sha256 of {name}", path=folder / "manifest.json", field="files") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleProblem(f"could not be read: {error.strerror or error}", path=path) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        problem = "is not the file that was exported: its sha256 differs from that in manifest.json"
        raise BundleProblem(problem, path=path, remedy=EXPORT_AGAIN)
    return content


def read_array(folder: Path, manifest: dict[str, Any], name: str) -> np.ndarray:
    """The array of a bundle's .npy file, checked as by `verified_bytes`. Raises BundleProblem, ValueError."""
    content = verified_bytes(folder, manifest, name)
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
