"""Which kind of file or folder something is, by its first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from comkd_cli.errors import ComkdError

ZIP = b"PK\x03\x04"  # torch.save writes a zip file
IR_VERSION = b"\x08"  # an ONNX file begins with its field ir_version
KNOWN = "student.pt, teacher.pt, text_student.pt, an exported .onnx, a bundle"


def kind_of(path: Path) -> Literal["bundle", "graph", "checkpoint"]:
    """What a path may be; its reader decides. Raises ComkdError for anything else, OSError if it cannot be read."""
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return "bundle"
        raise unknown_file(path, "is a folder without a manifest.json")
    if not path.is_file():  # opening a pipe would block forever
        raise unknown_file(path, "is not a regular file")
    with path.open("rb") as stream:
        start = stream.read(len(ZIP))
    if start == ZIP:
        return "checkpoint"
    if start.startswith(IR_VERSION):
        return "graph"
    raise unknown_file(path)


def unknown_file(path: Path, problem: str = "is not a file that comkd writes") -> ComkdError:
    """The error of a file that is of no known kind."""
    return ComkdError(problem, path=path, allowed=KNOWN)
