"""Examples in the help: every command has one that its own parser takes, and docs/cli.md shows every option."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from comkd_cli.cli.app import main
from comkd_cli.cli.examples import EXAMPLES

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


COMMANDS = dict(every_command(main))
each_command = pytest.mark.parametrize("name", COMMANDS)


def words_of(line: str) -> list[str]:
    """The arguments of comkd in a line of a shell: without its launcher, redirection and comment."""
    command = re.sub(r'^eval "\$\((.*)\)".*$', r"\1", line).partition(" > ")[0]
    words = shlex.split(command, comments=True)
    return words[words.index("comkd_cli" if "comkd_cli" in words else "comkd") + 1 :]


def test_examples_are_of_commands_that_exist() -> None:
    assert set(EXAMPLES) == set(COMMANDS)


@each_command
def test_an_example_is_parsed_by_its_command(name: str) -> None:
    for line in EXAMPLES[name]:
        words, command = words_of(line), COMMANDS[name]
        depth = len(name.split())
        assert words[:depth] == name.split(), line
        rest = words[depth:]
        while isinstance(command, click.Group):
            command, rest = command.commands[rest[0]], rest[1:]
        context = click.Context(command, info_name=name)
        values, left, _ = command.make_parser(context).parse_args(rest)
        assert left == []
        for parameter in command.get_params(context):
            if parameter.required:
                assert values.get(parameter.name), line


@each_command
def test_help_ends_with_the_examples(name: str) -> None:
    shown = COMMANDS[name].get_help(click.Context(COMMANDS[name], info_name=f"comkd {name}"))
    assert shown.rstrip().splitlines()[-len(EXAMPLES[name]) :] == [f"    {line}" for line in EXAMPLES[name]]


@each_command
def test_the_page_has_every_command_and_every_option(name: str) -> None:
    (section,) = re.findall(rf"^## comkd {name}\n\n```text\n(.*?)^```", PAGE, re.M | re.S)
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"(^|[\s,/]){re.escape(option)}\b", section, re.M), option
    for line in EXAMPLES[name]:
        assert line in section
