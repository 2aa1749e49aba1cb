"""Errors of bundles: what edge/ raises, which cannot import comkd_cli.errors, as errors of comkd. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.errors import BundleError


@contextmanager
def bundle_errors() -> Iterator[None]:
    """Within the block a BundleProblem becomes a BundleError with its fields."""
    try:
        yield
    except BundleProblem as error:
        raise BundleError(
            error.problem,
            path=error.path,
            field=error.field,
            found=error.found,
            allowed=error.allowed,
            remedy=error.remedy,
        ) from error
