"""What a bundle or a graph is. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from comkd_cli.bundles.graph_facts import graph_facts
from comkd_cli.bundles.problems import bundle_errors
from comkd_cli.edge.manifest import read_manifest, read_preprocessing, verified_bytes
from comkd_cli.edge.self_test import REFERENCE_FOLDER
from comkd_cli.files import sha256_of_file
from comkd_cli.flows.inspect.kinds import unknown_file

FROM_MANIFEST: Mapping[str, type | tuple[type, ...]] = {
    "format": str,
    "made_by": str,
    "recipe": str,
    "data": str,
    "teacher": str,
    "student": str,
    "student_sha256": str,
    "template": str,
    "memory": str,
    "license": str,
    "opset": int,
    "parameters": int,
    "multiply_adds": int,
    "feature_dim": int,
    "logit_scale": (int, float),
    "test_top1_percent": (int, float),
    "test_images": (int, float),
    "classes_added": list,
    "calibration": dict,
    "threshold": dict,
    "images": dict,
    "failed": dict,
    "text": dict,
}


def inspect_graph(path: Path) -> dict[str, Any]:
    """An ONNX file; see `graph_facts`. Raises ComkdError for a file that is not a graph."""
    facts = graph_facts(path)
    if facts is None:
        raise unknown_file(path)
    common = {"kind": "graph", "path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    return {**common, **facts}


def inspect_bundle(folder: Path) -> dict[str, Any]:
    """A bundle: the facts of its manifest, its precisions, and whether its files are those that were exported.

    Fields whose type differs from what comkd writes are left out. Raises BundleError.
    """
    with bundle_errors():
        manifest = read_manifest(folder)
        preprocessing = read_preprocessing(folder, manifest)
        names = verified_bytes(folder, manifest, "classes.txt").decode("utf-8", "replace").splitlines()
    manifest_file = folder / "manifest.json"
    return {
        "kind": "bundle",
        "path": str(folder),
        "sha256": hashlib.sha256(manifest_file.read_bytes()).hexdigest(),
        **{name: manifest[name] for name, kind in FROM_MANIFEST.items() if isinstance(manifest.get(name), kind)},
        "classes": names,
        "preprocessing": vars(preprocessing),
        "precisions": manifest["precisions"],
        "files": _files(folder, manifest["files"]),
    }


def _files(folder: Path, entries: object) -> dict[str, Any]:
    """The files of a manifest, by whether they are what was exported.

    If all of reference/ is missing, it was removed, as docs/bundle.md allows, and its files do not count as missing.
    """
    found: dict[str, Any] = {"count": 0, "bytes": 0, "changed": [], "missing": []}
    recorded = entries if isinstance(entries, dict) else {}
    for name, entry in recorded.items():
        path = folder / name
        if not _is_below(name) or not _is_file(path):
            found["missing"].append(name)
            continue
        found["count"] += 1
        found["bytes"] += path.stat().st_size
        if not isinstance(entry, dict) or sha256_of_file(path) != entry.get("sha256"):
            found["changed"].append(name)
    reference = {name for name in recorded if _is_below(name) and PurePosixPath(name).parts[:1] == (REFERENCE_FOLDER,)}
    if reference and reference <= set(found["missing"]):
        found["missing"] = [name for name in found["missing"] if name not in reference]
        found["reference"] = "removed"
    return found


def _is_file(path: Path) -> bool:
    """Whether a file exists; a manifest can name one that no file system accepts."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_below(name: str) -> bool:
    """Whether a name of a manifest stays within its folder."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
