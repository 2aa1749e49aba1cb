"""What a shell completes, asked as the shell's own script asks, and the nearest name for what is mistyped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from comkd_cli.cli.app import main
from comkd_cli.errors import DataError, RecipeError
from comkd_cli.recipe import bundled_recipes, find_recipe
from comkd_cli.recipe.catalog import CATALOG


def completed(*words: str) -> list[str]:
    """The names that are offered for the last of the words after `comkd`."""
    found = ShellComplete(main, {}, "comkd", "_COMKD_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found if item.type == "plain"]


def test_commands_and_options_are_completed() -> None:
    assert completed("dis") == ["distill", "distill-text"]
    assert completed("export", "--text-p") == ["--text-precision"]
    assert completed("export", "x.pt", "--precision", "f") == ["fp32", "fp16"]
    assert completed("completion", "") == ["bash", "zsh", "fish"]


def test_recipes_and_datasets_are_completed() -> None:
    assert completed("distill", "") == list(bundled_recipes())
    assert completed("recipes", "show", "dig") == ["digits"]
    assert completed("distill", "digits", "--dataset", "") == ["digits", *CATALOG]
    assert completed("datasets", "fetch", "dtd", "euro") == ["eurosat"]


@pytest.mark.parametrize("folder", ["runs", "elsewhere"])
def test_students_and_runs_are_completed(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [Path(folder) / name for name in ("own/pets/seed1", "own/pets/seed2", "own/dtd/seed1")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "student.pt").touch()
    Path(folder, "own/pets/seed3").mkdir()  # not finished
    given = () if folder == "runs" else ("--runs", folder)
    assert completed("report", *given, "") == sorted(map(str, runs))
    assert completed("report", *given, f"{folder}/own/pets") == [str(run) for run in runs[:2]]
    assert completed("export", *given, f"{folder}/own/d") == [str(runs[2] / "student.pt")]


def test_files_are_completed_beside_the_names() -> None:
    first, *_ = ShellComplete(main, {}, "comkd", "_COMKD_COMPLETE").get_completions(["distill"], "d")
    assert first.type == "file"


@pytest.mark.needs_tool("bash")
def test_bash_completes_by_the_script(tmp_path: Path) -> None:
    script = CliRunner().invoke(main, ["completion", "bash"])
    assert script.exit_code == 0
    program = tmp_path / "comkd"
    program.write_text(f"#!{sys.executable}\nfrom comkd_cli.cli import main\nmain()\n")  # as pip installs it
    program.chmod(0o755)
    asked = "COMP_WORDS=(comkd recipes show dig); COMP_CWORD=3; _comkd_completion comkd; echo found ${COMPREPLY[@]}"
    code = f"{script.output}\n{asked}"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bash = shutil.which("bash") or "bash"
    done = subprocess.run([bash, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.stdout.strip() == "found digits", done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell: str) -> None:
    script = CliRunner().invoke(main, ["completion", shell])
    assert script.exit_code == 0
    assert f"_COMKD_COMPLETE={shell}_complete" in script.output


def test_a_mistyped_command_gets_the_nearest_one() -> None:
    with pytest.raises(click.UsageError) as caught:
        main.main(["distil", "digits"], standalone_mode=False)
    assert caught.value.message == "No such command 'distil'. Did you mean 'distill'?"
    assert CliRunner().invoke(main, ["qqqq"]).exit_code == 2
    assert "Did you mean" not in CliRunner().invoke(main, ["qqqq"]).output


def test_a_mistyped_recipe_or_dataset_gets_the_nearest_one() -> None:
    with pytest.raises(RecipeError) as faulty:
        find_recipe("digts.yaml")
    assert faulty.value.remedy == "did you mean digits?"
    with pytest.raises(RecipeError) as faulty:
        find_recipe("zzz")
    assert faulty.value.remedy == "specify a YAML file or the name of a bundled recipe"
    from comkd_cli.cli.commands.datasets import _chosen

    with pytest.raises(DataError) as unknown:
        _chosen(["euroset"])
    assert unknown.value.remedy == "did you mean eurosat?"
