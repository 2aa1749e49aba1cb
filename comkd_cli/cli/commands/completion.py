"""`comkd completion`: the script that makes a shell complete commands, options, recipes, datasets and runs."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
def command(shell: str) -> None:
    """Print a script with which SHELL completes `comkd`.

    SHELL is bash, zsh or fish. Commands and options are completed, and the names of recipes, datasets and the folders
    of runs. bash needs version 4.4 or later.
    """
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None  # click has these shells
    root = click.get_current_context().find_root()
    # Without bash's own check, which starts bash: the script may be for another machine.
    script = complete(root.command, {}, "comkd", "_COMKD_COMPLETE")
    click.echo(script.source_template % script.source_vars())
