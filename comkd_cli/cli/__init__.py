"""The command line: commands, their options, and how they print."""

from comkd_cli.cli.app import main

__all__ = ["main"]
