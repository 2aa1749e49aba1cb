"""Keeps what libraries say to their programmers away from the user's terminal."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

# Warnings that the user can act on, by how they begin: a GPU that torch finds and cannot use.
FOR_USERS = ("CUDA initialization", "User provided device_type of 'cuda', but CUDA is not available")
# For libraries that read their level once, and for processes that comkd starts; what the user has set stays.
ENVIRONMENT = {
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While the block lasts, libraries' warnings and log lines are dropped, but for those that concern the user.

    The filters of warnings stay as they are, so that a warning that is an error remains one.
    """
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    silent = logging.NullHandler()  # a root logger with a handler writes nothing to standard error by itself
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
