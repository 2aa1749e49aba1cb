"""Examples in the help: every command has one that its own parser takes, and docs/cli.md shows every option."""

import re
from pathlib import Path

import click
import pytest

from comkd_cli.cli.examples import EXAMPLES
from tests.shell import COMMANDS, assert_parsed, context_of, words_of

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
each_command = pytest.mark.parametrize("name", COMMANDS)


def test_examples_are_of_commands_that_exist() -> None:
    assert set(EXAMPLES) == set(COMMANDS)


@each_command
def test_an_example_is_parsed_by_its_command(name: str) -> None:
    depth = len(name.split())
    for line in EXAMPLES[name]:
        assert (words_of(line) or [])[:depth] == name.split(), line
        assert_parsed(line)


@each_command
def test_help_ends_with_the_examples(name: str) -> None:
    shown = COMMANDS[name].get_help(context_of(COMMANDS[name], f"comkd {name}"))
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
