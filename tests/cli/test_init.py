"""`comkd init` as a command: what it prints, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from comkd_cli.cli import main
from comkd_cli.cli.commands import init
from tests.outlined import outline_once

WriteImage = Callable[..., Path]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def pets(tmp_path: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    outline_once(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for c, name in enumerate(("cat", "[red]dog")):
        for i in range(8):
            write_image(tmp_path / f"pets/train/{name}/{i}.jpg", seed=100 * c + i)
    (tmp_path / "pets/train/cat/note\x1b[31m.txt").write_text("")
    (tmp_path / "pets/train/cat/empty.jpg").write_bytes(b"")
    (tmp_path / "pets/train/cat/copy.jpg").write_bytes((tmp_path / "pets/train/cat/0.jpg").read_bytes())
    return Path("pets")


def test_the_summary_and_the_next_commands_follow_the_recipe(pets: Path) -> None:
    result = invoke("init", pets, "--no-download", "--out", "my recipe.yaml")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert "18 training" in rows["images"]
    assert "2: [red]dog, cat" in rows["classes"]
    assert "empty.jpg: is empty" in rows["unreadable"]
    assert "1 copy of other images" in rows["duplicates"]
    assert "1 file of another type is skipped: 1 .txt" in rows["notes"]
    assert [line.strip() for line in lines[-2:]] == [
        "comkd distill 'my recipe.yaml' --dry-run",
        "comkd distill 'my recipe.yaml'",
    ]
    plan = invoke("distill", "my recipe.yaml", "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert "15 training images, 3 held-out images" in plan.stdout
    again = invoke("init", pets, "--no-download", "--out", "my recipe.yaml")
    assert again.exit_code == 1
    assert again.stderr.startswith("error: my recipe.yaml: exists already")


def test_a_folder_without_class_names_is_one_message(pets: Path, write_image: WriteImage) -> None:
    write_image(Path("flat/a.jpg"))
    for folder in ("flat", "nowhere"):
        result = invoke("init", folder)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in result.output
    assert not Path("recipe.yaml").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--budget", "5M", "--max-latency", "20ms"),
        ("--budget", "0"),
        ("--budget", "5 apples"),
        ("--budget", "-5M"),
        ("--max-latency", "20min"),
        ("--max-latency", "nan"),
        ("--classes", "nowhere.txt"),
    ],
)
def test_misuse_is_exit_2_and_writes_nothing(pets: Path, arguments: tuple[str, ...]) -> None:
    result = invoke("init", pets, *arguments)
    assert result.exit_code == 2
    assert not Path("recipe.yaml").exists()


@pytest.mark.parametrize(
    ("text", "parameters"), [("5M", 5_000_000), ("1.5m", 1_500_000), ("500k", 500_000), ("5000000", 5_000_000)]
)
def test_amounts_of_parameters(text: str, parameters: int) -> None:
    option = next(option for option in init.command.params if option.name == "budget")
    assert init._budget(None, option, text) == parameters  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "milliseconds"), [("20ms", 20.0), ("20", 20.0), ("0.02 s", 20.0), ("1.5MS", 1.5)])
def test_times_are_milliseconds(text: str, milliseconds: float) -> None:
    option = next(option for option in init.command.params if option.name == "max_latency")
    assert init._latency(None, option, text) == milliseconds  # type: ignore[arg-type]
