from pathlib import Path

import click.testing
import pytest

from comkd_cli.cli.app import main
from comkd_cli.cli.commands.report import _student_file
from comkd_cli.errors import DataError


def test_a_run_is_a_student_or_the_folder_that_holds_it(tmp_path: Path) -> None:
    student = tmp_path / "tiny/digits/seed1/student.pt"
    student.parent.mkdir(parents=True)
    student.touch()
    assert _student_file(student) == _student_file(student.parent) == student


@pytest.mark.parametrize("run", ["absent", "absent/student.pt", "ViT-B-32:openai"])
def test_a_run_that_does_not_exist_is_named(run: str) -> None:
    with pytest.raises(DataError) as caught:
        _student_file(Path(run))
    assert caught.value.path == Path(run)
    assert "student.pt" in str(caught.value.remedy)


def test_a_folder_of_several_runs_names_them_and_an_empty_one_says_how_to_make_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        (tmp_path / f"tiny/digits/seed{seed}").mkdir(parents=True)
        (tmp_path / f"tiny/digits/seed{seed}/student.pt").touch()
    with pytest.raises(DataError) as caught:
        _student_file(tmp_path / "tiny")
    assert str(tmp_path / "tiny/digits/seed2") in str(caught.value.remedy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        _student_file(tmp_path / "empty")
    assert "comkd distill" in str(caught.value.remedy)


def test_without_a_run_the_command_is_misused() -> None:
    result = click.testing.CliRunner().invoke(main, ["report"])
    assert result.exit_code == 2
    assert "RUN" in result.output
