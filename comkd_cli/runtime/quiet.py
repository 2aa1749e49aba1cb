"""Silences libraries that log, warn or print what the user cannot act on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def logging_disabled() -> Iterator[None]:
    """Disable all log messages up to the level ERROR in the block."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Disable log messages, warnings and standard output in the block.

    For exporters and quantisers: they log an error, with its traceback, and raise it as well.
    """
    with logging_disabled(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
