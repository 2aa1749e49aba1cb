"""Hides the warnings and log lines of libraries, which are meant for developers."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

# Beginnings of the warnings that a user can act on: torch finds a GPU and cannot use it.
FOR_USERS = ("CUDA initialization", "User provided device_type of 'cuda', but CUDA is not available")
# For libraries that read their level once, and for child processes. A value that the user has set is kept.
ENVIRONMENT = {
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop libraries' warnings and log lines within the block, except those that concern the user.

    The warning filters are not changed, so a warning that is turned into an error remains one.
    """
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    silent = logging.NullHandler()  # without any handler the root logger would print to standard error
    logging.root.addHandler(silent)
    show = warnings.showwarning
    warnings.showwarning = _show
    try:
        yield
    finally:
        warnings.showwarning = show
        logging.root.removeHandler(silent)
        for name, own in before.items():
            if own is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = own


def _show(message: Warning | str, *_where: Any, **_more: Any) -> None:
    text = str(message)
    if text.startswith(FOR_USERS):
        click.echo(f"{click.style('note:', fg='yellow')} {text.splitlines()[0]}", err=True)
