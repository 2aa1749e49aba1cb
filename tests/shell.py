"""Lines of a shell, as help texts and pages show them."""

import re
import shlex
from collections.abc import Iterator

import click

from comkd_cli.cli.app import main


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Each command below a group, such as `datasets check`."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


COMMANDS = dict(every_command(main))


def context_of(command: click.Command, name: str | None = None) -> click.Context:
    """A context with the settings that `main` would pass on: a command keeps the help option of its first context."""
    return click.Context(command, info_name=name, **main.context_settings)


def lines_of(block: str) -> list[str]:
    """The lines of a block, where a backslash continues one, without empty ones and comments."""
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def words_of(line: str) -> list[str] | None:
    """The arguments of comkd in a line: without its launcher, redirection and comment. None for other programs."""
    command = re.sub(r'^eval "\$\((.*)\)".*$', r"\1", line).partition(" > ")[0]
    words = shlex.split(command, comments=True)
    names = [name for name in ("comkd_cli", "comkd") if name in words]
    return words[words.index(names[0]) + 1 :] if names else None


def assert_parsed(line: str) -> None:
    """A line of comkd is taken by the parser of its command, with all arguments that this needs."""
    rest = words_of(line)
    assert rest, line
    command: click.Command = main
    context = context_of(main)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        below = command.get_command(context, rest[0])
        assert below is not None, line
        command, rest = below, rest[1:]
        context = context_of(command)
    values, left, _ = command.make_parser(context).parse_args(rest)
    assert left == [], line
    for parameter in command.get_params(context):
        if parameter.required:
            assert values.get(parameter.name), line
