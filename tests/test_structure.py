"""Limits on the size of modules and functions; ruff holds the numbers of parameters, statements and branches."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "comkd_cli").rglob("*.py"))
MODULE_LINES, FUNCTION_LINES = 350, 60


def too_long(source: str) -> list[str]:
    """What is longer than its limit and does not say why, as `name: lines`; a module has the name ``."""
    lines = source.splitlines()
    parts = [("", 1, len(lines), MODULE_LINES)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts.append((node.name, node.lineno, node.end_lineno or node.lineno, FUNCTION_LINES))
    return [
        f"{name}: {last - first + 1}"
        for name, first, last, limit in parts
        if last - first + 1 > limit
        and not any(re.match(rf"\s*# Longer than {limit} lines because \w+", line) for line in lines[first - 1 : last])
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_and_functions_are_short_or_say_why_not(module: Path) -> None:
    assert too_long(module.read_text(encoding="utf-8")) == []


def test_the_limits_and_the_reasons_are_seen() -> None:
    def function(lines: int, comment: str = "") -> str:
        body = [f"    {comment or 'pass'}", *["    pass"] * (lines - 2)]
        return "\n".join(["def long():", *body])

    assert too_long(function(60)) == []
    assert too_long(function(61)) == ["long: 61"]
    assert too_long(function(61, "# Longer than 60 lines because it is a table.")) == []
    assert too_long(function(61, "# Longer than 60 lines because")) == ["long: 61"]
    assert too_long("class A:\n" + "\n".join(f"    {line}" for line in function(61).splitlines())) == ["long: 61"]
    assert too_long("x = 1\n" * 350) == []
    assert too_long("x = 1\n" * 351) == [": 351"]
    assert too_long("# Longer than 350 lines because it is a table.\n" + "x = 1\n" * 400) == []
