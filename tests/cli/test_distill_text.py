"""`comkd distill-text` at the command line: what it passes on, prints and refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from comkd_cli.cli import main
from comkd_cli.flows import distill_text as flow
from comkd_cli.flows.distill_text import DistilledText, DistillTextOptions
from comkd_cli.training import accelerator

FIGURES = {
    "held_out_names": 200.0,
    "held_out_cosine_mean": 0.91234,
    "held_out_cosine_min": 0.5,
    "held_out_retrieval_percent": 37.5,
    "constant_cosine_mean": 0.75,
    "classes": 10.0,
    "classes_trained_on": 9.0,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of the flow, which does nothing else."""
    found: list[Any] = []

    def distil(path: Path, used: Any, options: DistillTextOptions, report: Any) -> DistilledText:
        found.append((path, options))
        record = SimpleNamespace(parameters=1000, teacher_parameters=9000, vocabulary=range(600), metrics=FIGURES)
        return DistilledText(Path("new file.pt"), record, {"the run": 10, "[WordNet]": 1990})  # type: ignore[arg-type]

    monkeypatch.setattr(flow, "distill_text", distil)
    monkeypatch.setattr(accelerator, "make_accelerator", lambda precision: None)
    return found


def test_options_reach_the_flow_and_figures_are_printed(calls: list[Any], tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.touch()
    arguments = ["s.pt", "--names", str(names), "--own-names-only", "--holdout-percent", "20", "--epochs", "3"]
    result = CliRunner().invoke(main, ["distill-text", *arguments, "--out", "o.pt", "--seed", "7", "--fresh"])
    assert result.exit_code == 0
    ((path, options),) = calls
    assert path == Path("s.pt")
    assert (options.out, options.name_files, options.own_names_only) == (Path("o.pt"), (names,), True)
    assert (options.held_out_percent, options.epochs, options.seed, options.fresh) == (20, 3, 7, True)
    for part in ("0.9123", "0.7500", "37.5 %", "[WordNet]", "1,000", "9 of 10"):
        assert part in result.stdout
    assert "comkd export s.pt --text-student 'new file.pt'" in result.stdout


def test_json_has_all_figures(calls: list[Any]) -> None:
    result = CliRunner().invoke(main, ["distill-text", "s.pt", "--json"])
    assert json.loads(result.stdout) == {
        "text_student": "new file.pt",
        "parameters": 1000,
        "teacher_parameters": 9000,
        "tokens": 600,
        "names": {"the run": 10, "[WordNet]": 1990},
        **FIGURES,
    }


@pytest.mark.parametrize(
    "arguments",
    [["--text", "--text-student", "t.pt"], ["--text-precision", "int8"]],
)
def test_a_bundle_has_one_text_encoder(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, ["export", "s.pt", *arguments]).exit_code == 2
