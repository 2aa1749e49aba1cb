"""`comkd classes` at the command line: what it prints and how it exits."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from comkd_cli.cli import main
from comkd_cli.events import Notice
from comkd_cli.flows import classes as flow
from comkd_cli.flows.classes import Added, AddOptions


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of the flow, which does nothing else."""
    found: list[Any] = []

    def add(path: Path, names: tuple[str, ...], options: AddOptions, report: Any) -> tuple[Path, list[Added]]:
        found.append((path, names, options))
        report(Notice("a notice"))
        return Path("new file.pt"), [Added("red fox", "[fox]", 0.98765)]

    listed = SimpleNamespace(class_names=("cat", "[red] fox"), classes_added=("[red] fox",))
    monkeypatch.setattr(flow, "list_classes", lambda path: listed)
    monkeypatch.setattr(flow, "add_classes", add)
    return found


def test_without_add_the_classes_are_listed(calls: list[Any]) -> None:
    result = CliRunner().invoke(main, ["classes", "student.pt"])
    assert (result.exit_code, result.stdout) == (0, "cat\n[red] fox (added)\n")
    result = CliRunner().invoke(main, ["classes", "student.pt", "--json"])
    assert json.loads(result.stdout) == {"classes": ["cat", "[red] fox"], "classes_added": ["[red] fox"]}
    assert calls == []


def test_added_classes_are_printed_with_the_nearest_one(calls: list[Any]) -> None:
    arguments = ["classes", "s.pt", "--add", "red fox", "--template", "a {}", "--out", "o.pt", "--force"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert calls == [(Path("s.pt"), ("red fox",), AddOptions(Path("o.pt"), ("a {}",), force=True))]
    assert result.stdout.splitlines() == [
        "red fox: nearest is [fox], cosine 0.9877",
        "student: new file.pt",
        "  comkd evaluate 'new file.pt'",
        "  comkd export 'new file.pt'",
    ]
    assert "a notice" in result.stderr
    result = CliRunner().invoke(main, ["classes", "s.pt", "--add", "red fox", "--json"])
    entry = {"class": "red fox", "nearest": "[fox]", "cosine": 0.98765}
    assert json.loads(result.stdout) == {"student": "new file.pt", "classes_added": [entry]}


@pytest.mark.parametrize("options", [["--out", "o.pt"], ["--template", "a {}"], ["--force"]])
def test_options_of_adding_need_a_class(calls: list[Any], options: list[str]) -> None:
    assert CliRunner().invoke(main, ["classes", "s.pt", *options]).exit_code == 2
    assert calls == []
