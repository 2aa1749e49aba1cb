"""A recipe as YAML in which the reason for each setting is written above it."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

INDENT = 2
COMMENT_WIDTH = 92


@dataclass(frozen=True)
class Setting:
    """A field of a recipe, its value and why it has it."""

    name: str
    value: Any
    """Plain data; a list of Settings is a mapping whose fields have reasons of their own."""
    reason: str = ""


class _Representer(RoundTripRepresenter):
    """Writes `null`, where ruamel leaves the value out: a reader could think that the line had lost its value."""


def _null(representer: RoundTripRepresenter, _: None) -> ScalarNode:
    node: ScalarNode = representer.represent_scalar("tag:yaml.org,2002:null", "null")
    return node


_Representer.add_representer(type(None), _null)


def commented_yaml(settings: Sequence[Setting], head: str) -> str:
    """YAML that reads back to the settings. head: the comment at the start, whose lines are kept."""
    writer = YAML()
    writer.Representer = _Representer
    # ruamel cannot read back every long text that it folds, nor these three characters, which are line breaks to its
    # writer but not to its reader, unless they are escaped.
    writer.width = 2**20
    tree = _tree(settings, 0)
    writer.allow_unicode = not set("\x85\u2028\u2029") & set(json.dumps(tree, ensure_ascii=False))
    stream = io.StringIO()
    writer.dump(tree, stream)
    lines = [f"# {line}".rstrip() for line in map(printable, head.split("\n"))]
    return "\n".join(lines) + "\n\n" + stream.getvalue()


def printable(text: str) -> str:
    """A text whose characters can stand in a comment or on a terminal; others, such as line breaks, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _tree(settings: Sequence[Setting], depth: int) -> CommentedMap:
    tree = CommentedMap()
    for setting in settings:
        value = setting.value
        if isinstance(value, list | tuple) and value and isinstance(value[0], Setting):
            value = _tree(value, depth + 1)
        tree[setting.name] = _with_numbers_in_a_line(value)
        if setting.reason:
            width = COMMENT_WIDTH - depth * INDENT
            comment = "\n".join(
                textwrap.wrap(printable(setting.reason), width, break_long_words=False, break_on_hyphens=False)
            )
            tree.yaml_set_comment_before_after_key(setting.name, before=comment, indent=depth * INDENT)
    return tree


def _with_numbers_in_a_line(value: Any) -> Any:
    """The same value; lists of numbers, as in a model's config, are written as [1, 2]."""
    if isinstance(value, dict) and not isinstance(value, CommentedMap):
        return {name: _with_numbers_in_a_line(below) for name, below in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        line = CommentedSeq(value)
        line.fa.set_flow_style()
        return line
    return value
