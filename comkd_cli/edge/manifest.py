"""A bundle's manifest and its files, each checked before it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from comkd_cli.edge.images import Preprocessing, checked_preprocessing

BUNDLE_FORMAT = "comkd-bundle/1"


class BundleProblem(Exception):
    """A bundle that can't be used: a file is missing, changed or not what the manifest says."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, checked for what a reader relies on. Raises BundleProblem."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleProblem(f"{folder} is not a bundle: it has no manifest.json") from error
    except (OSError, ValueError) as error:
        raise BundleProblem(f"{path}: can't be read: {error}") from error
    if isinstance(manifest, dict) and _is_newer(manifest.get("format")):
        raise BundleProblem(
            f"{path}: has the format {manifest['format']} of a newer comkd; this one reads {BUNDLE_FORMAT}: upgrade "
            "comkd, or run the bundle's own predict.py"
        )
    if not isinstance(manifest, dict) or manifest.get("format") != BUNDLE_FORMAT:
        raise BundleProblem(f"{path}: is not a manifest of format {BUNDLE_FORMAT}")
    if missing := {"preprocessing", "files", "precisions"} - set(manifest):
        raise BundleProblem(f"{path}: lacks {', '.join(sorted(missing))}")
    precisions = manifest["precisions"]
    if not isinstance(precisions, dict) or not precisions or not all(isinstance(p, dict) for p in precisions.values()):
        raise BundleProblem(f"{path}: precisions: should name the graphs of at least one precision")
    return manifest


def _is_newer(found: object) -> bool:
    """Whether a manifest's format is a later version of BUNDLE_FORMAT."""
    kind, _, version = str(found).rpartition("/")
    known_kind, _, known = BUNDLE_FORMAT.rpartition("/")
    is_number = version.isascii() and version.isdigit() and len(version) < 10
    return kind == known_kind and is_number and int(version) > int(known)


def read_preprocessing(folder: Path, manifest: dict[str, Any]) -> Preprocessing:
    """The pre-processing that a manifest asks for. Raises BundleProblem."""
    try:
        return checked_preprocessing(manifest["preprocessing"])
    except ValueError as error:
        raise BundleProblem(f"{folder / 'manifest.json'}: preprocessing: {error}") from error


def verified_bytes(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    """The content of one file of a bundle, once its sha256 is that of the manifest."""
    path = folder / name
    try:
        sha256 = manifest["files"][name]["sha256"]
    except (KeyError, TypeError) as error:
        raise BundleProblem(f"{folder / 'manifest.json'}: does not list {name} with its sha256") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleProblem(f"{path}: can't be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BundleProblem(f"{path}: is not the file that was exported (its sha256 differs); export again")
    return content
