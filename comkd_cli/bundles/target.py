"""The folder that a bundle is written to. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comkd_cli.edge.manifest import BundleProblem, read_manifest
from comkd_cli.errors import ExportError
from comkd_cli.files import atomic_folder, remove_unfinished
from comkd_cli.runtime.locks import sole_writer


@contextmanager
def new_bundle(out: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block succeeds; see `atomic_folder` and `check_target`.

    Raises InUseError if another process is exporting to `out`.
    """
    with sole_writer(out):
        check_target(out, force)  # again: the other process may have ended
        with atomic_folder(out) as folder:
            yield folder


def check_target(out: Path, force: bool) -> None:
    """Refuse to replace an existing path, and with `force` a folder that is not a bundle. Raises ExportError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        remove_unfinished(out)  # of an export that was killed after it had moved the bundle here
        raise ExportError("already exists", path=out, remedy="replace it with --force, or choose another --out")
    try:
        read_manifest(out)
    except BundleProblem as error:
        raise ExportError(
            "is not a bundle, so --force does not replace it", path=out, remedy="choose another --out"
        ) from error
