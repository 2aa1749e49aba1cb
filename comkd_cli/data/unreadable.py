"""Images that could not be read: how many may be skipped before a result would mislead."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from comkd_cli.errors import DataError

MOST_NAMED = 10  # unreadable images that are named one by one; all are counted


def check_unreadable(problems: Collection[str], images: int, limit_percent: float, what: str = "images") -> None:
    """Raise DataError, naming them, if more of this many images than the limit could not be read.

    problems: a line for each unreadable image. what: names the images in the message, such as "test images".
    """
    share = 100 * len(problems) / images if problems else 0.0
    if share > limit_percent:
        named = "\n".join(f"  {problem}" for problem in islice(problems, MOST_NAMED))
        raise DataError(
            f"{len(problems)} of {images} {what} ({share:.3g} %) could not be read",
            field="data.unreadable_limit_percent",
            allowed=f"{limit_percent:g} %",
            remedy=f"repair or remove them, or raise the limit:\n{named}",
        )
