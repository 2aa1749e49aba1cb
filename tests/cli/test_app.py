import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from comkd_cli.cli import commands
from comkd_cli.cli.app import CommandFolder, main
from comkd_cli.edge import benchmark
from comkd_cli.edge.benchmark import GraphRow, Times
from comkd_cli.edge.classifier import Classifier
from comkd_cli.recipe import bundled_recipes, load_recipe, parse_recipe, read_yaml

Run = Callable[..., subprocess.CompletedProcess[str]]
THREE_MISTAKES = """
data: {dataset: digits}
teacher: {arch: A, weight: w, adapt: full}
student: {arch: B, weights: w, projector: {layers: 9}}
precison: fp16
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="comkd")


def every_command(command: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from every_command(inner, (*path, name))


def at(path: tuple[str, ...]) -> click.Command:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return command


COMMANDS = list(every_command())
each_command = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(("comkd", *path)))


# --- help ----------------------------------------------------------------------------------------------


@each_command
def test_help_comes_without_importing_torch_or_open_clip(path: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "comkd_cli", *path, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert {"click", "comkd_cli.cli.app"} <= imported
    assert imported & {"torch", "open_clip", "torchvision", "accelerate", "onnxruntime", "sklearn"} == set()


@each_command
def test_every_command_and_every_option_says_what_it_is_for(path: tuple[str, ...]) -> None:
    command = at(path)
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    shown = CliRunner().invoke(main, [*path, "-h"])
    assert shown.exit_code == 0
    assert command.help.splitlines()[0].split()[0] in shown.output


@pytest.mark.parametrize("path", [(), ("datasets",), ("recipes",)], ids=" ".join)
def test_in_80_columns_the_summary_of_each_command_is_whole_and_on_one_line(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(main, [*path, "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    _, _, commands_ = shown.output.partition("\nCommands:\n")
    lines = commands_.partition("\n\n")[0].splitlines()
    group = at(path)
    assert isinstance(group, click.Group)
    assert [line.split()[0] for line in lines] == group.list_commands(click.Context(group))
    assert not [line for line in lines if not line.endswith(".") or line.endswith("...")]


@each_command
def test_every_argument_is_described_in_the_help(path: tuple[str, ...]) -> None:
    command = at(path)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            name = parameter.make_metavar(click.Context(command)).strip("[].").removesuffix("...")
            assert name.rstrip(".") in command.help, name  # type: ignore[operator]


def test_the_folder_is_the_list_of_commands() -> None:
    modules = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    files = {name.replace("_", "-") for name in modules}
    assert set(main.list_commands(click.Context(main))) == files
    assert {path[0] for path in COMMANDS if path} == files
    assert {"distill", "evaluate", "export", "predict", "recipes"} <= files


def test_the_version_is_that_of_the_package() -> None:
    written = re.search(r'^version = "(.*)"$', (Path(__file__).parents[2] / "pyproject.toml").read_text(), re.M)
    assert written is not None
    assert invoke("--version").output.split()[-1] == written[1]


# --- the error boundary, with a command that fails in a chosen way -------------------------------------

FAILING = """
import click
from comkd_cli.errors import DataError, Interrupted

@click.command()
@click.argument("how")
def command(how):
    "Fail in a chosen way."
    if how == "data":
        raise DataError("pets: no such folder\\n  look again")
    if how == "stopped":
        raise Interrupted("stopped; the state is saved", 143)
    if how == "hangup":
        raise Interrupted("stopped; the state is saved", 129)
    if how == "ctrl-c":
        raise KeyboardInterrupt
    if how == "missing":
        open("/no/such/file")
    if how == "nameless":
        raise OSError("something odd")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    click.echo("fine")
"""


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs a command `fail` that is in the folder of commands during the test."""
    folder = tmp_path / "more commands"
    folder.mkdir()
    (folder / "fail.py").write_text(FAILING)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(folder)])
    yield lambda how, *before: invoke(*before, "fail", how)
    sys.modules.pop("comkd_cli.cli.commands.fail", None)


def test_a_module_put_into_the_folder_is_a_command(fails: Callable[..., Result]) -> None:
    assert "fail" in main.list_commands(click.Context(main))
    assert "Fail in a chosen way." in invoke("--help").output
    assert fails("not").output == "fine\n"


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("data", 1, "error: pets: no such folder\n  look again\n"),
        ("stopped", 143, "note: stopped; the state is saved\n"),
        ("hangup", 129, "note: stopped; the state is saved\n"),
        ("ctrl-c", 130, "note: interrupted; rerun the same command to resume\n"),
        ("missing", 1, "error: /no/such/file: No such file or directory\n"),
    ],
)
def test_a_user_error_is_one_message_and_an_exit_code(
    fails: Callable[..., Result], how: str, status: int, message: str
) -> None:
    result = fails(how)
    assert (result.exit_code, result.stderr, result.stdout) == (status, message, "")


@pytest.mark.parametrize(("how", "kind"), [("nameless", OSError), ("bug", ZeroDivisionError)])
def test_a_bug_keeps_its_traceback(fails: Callable[..., Result], how: str, kind: type[Exception]) -> None:
    assert type(fails(how).exception) is kind


@pytest.mark.parametrize(("how", "kind"), [("data", "DataError"), ("missing", "FileNotFoundError")])
def test_debug_lets_the_traceback_through(fails: Callable[..., Result], how: str, kind: str) -> None:
    assert type(fails(how, "--debug").exception).__name__ == kind


def test_the_boundary_is_that_of_the_command_itself() -> None:
    assert type(main) is CommandFolder


# --- real processes ------------------------------------------------------------------------------------


def test_a_recipe_with_three_mistakes_is_three_lines_and_exit_1(run_comkd: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(THREE_MISTAKES)
    failed = run_comkd("distill", "bad.yaml", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.splitlines() == [
        "error: bad.yaml: 3 faults:",
        "  bad.yaml: teacher.weight: unknown field; did you mean weights?",
        "  bad.yaml: student.projector.layers: should be less than or equal to 4, not 9",
        "  bad.yaml: precison: unknown field; did you mean precision?",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_debug_shows_the_traceback_of_such_a_recipe(run_comkd: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(THREE_MISTAKES)
    failed = run_comkd("--debug", "distill", "bad.yaml", cwd=tmp_path)
    assert failed.returncode == 1
    assert "Traceback (most recent call last)" in failed.stderr
    assert "comkd_cli.errors.RecipeError: bad.yaml: 3 faults" in failed.stderr


def test_an_unknown_recipe_is_answered_with_the_bundled_ones(run_comkd: Run, tmp_path: Path) -> None:
    failed = run_comkd("distill", "nosuch", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: nosuch: no such recipe")
    assert all(name in failed.stderr for name in bundled_recipes())
    assert len(failed.stderr.splitlines()) == 1


def test_ctrl_c_ends_a_command_with_130_and_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    pipe = tmp_path / "bundle/manifest.json"
    os.mkfifo(pipe)  # a reader waits for a writer
    command = [sys.executable, "-m", "comkd_cli", "predict", "bundle", "one.png"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        writer = open_once_read(pipe, process)
        try:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            os.close(writer)
    message = "note: interrupted; rerun the same command to resume\n"
    assert (process.returncode, out, err) == (130, "", message)


def open_once_read(pipe: Path, reader: subprocess.Popen[str]) -> int:
    """Open a pipe for writing as soon as the process reads from it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # it has no reader yet
            assert reader.poll() is None, reader.stderr
            assert time.monotonic() < deadline
            time.sleep(0.02)


# --- misuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "--nonsense",
        "distill",
        "distill digits digits",
        "distill digits --seed -1",
        "distill digits --seed one",
        "distill digits --runs {file}",
        "predict bundle",
        "predict bundle one.png --self-test",
        "predict bundle --self-test --benchmark",
        "predict bundle --benchmark --add-class fox",
        "predict bundle --benchmark -",
        "predict bundle --benchmark --seconds nan",
        "predict bundle --self-test --top 5",
        "predict bundle --self-test --no-threshold",
        "predict bundle one.png --seconds 2",
        "predict bundle one.png --top 0",
        "predict {file} one.png",
        "evaluate --folder nowhere",
        "evaluate --dataset digits --folder {folder}",
        "evaluate --template {{}}",
        "evaluate --classes {file}",
        "evaluate --dataset digits --template {{}}",
        "export",
        "export {folder}",
        "export student.pt --images nowhere",
        "export student.pt --max-latency-ms 0",
        "export student.pt --min-speedup nan",
        "recipes nonsense",
        "recipes show",
        "recipes check",
    ],
)
def test_misuse_exits_2_and_points_to_the_help(line: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [word.format(file=tmp_path / "file", folder=tmp_path) for word in line.split()]
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Usage: comkd" in result.stderr
    assert "--help" in result.stderr


def test_misuse_of_a_real_process_exits_2(run_comkd: Run, tmp_path: Path) -> None:
    failed = run_comkd("distill", "--sed", "1", "digits", cwd=tmp_path)
    assert failed.returncode == 2
    assert "--seed" in failed.stderr
    assert "Traceback" not in failed.stderr


# --- recipes -------------------------------------------------------------------------------------------


def test_recipes_list_names_every_recipe_and_what_it_is_about(run_comkd: Run, tmp_path: Path) -> None:
    listed = run_comkd("recipes", "list", cwd=tmp_path)
    assert listed.returncode == 0
    for name in bundled_recipes():
        (line,) = [line for line in listed.stdout.splitlines() if line.split()[0] == name]
        assert line.split(maxsplit=1)[1].strip() == load_recipe(name).about


def test_recipes_show_prints_yaml_that_reads_back_to_the_recipe() -> None:
    shown = invoke("recipes", "show", "digits", "--set", "seed=7", "--set", "loss.if_align=null")
    assert shown.exit_code == 0
    recipe = parse_recipe(read_yaml(shown.stdout, "shown"))
    assert recipe == load_recipe("digits", ["seed=7", "loss.if_align=null"])
    assert (recipe.seed, recipe.loss.if_align) == (7, None)


def test_recipes_check_names_valid_and_invalid_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(THREE_MISTAKES)
    Path("broken.yaml").write_text("a: [1")
    good = invoke("recipes", "check", "digits", "recipes/digits.yaml")
    assert (good.exit_code, good.stdout) == (0, "digits: ok\nrecipes/digits.yaml: ok\n")
    mixed = invoke("recipes", "check", "bad.yaml", "digits", "broken.yaml")
    assert (mixed.exit_code, mixed.stdout) == (1, "digits: ok\n")
    assert "bad.yaml: 3 faults" in mixed.stderr
    assert "broken.yaml: is not valid YAML" in mixed.stderr


# --- predict -------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    (folder / "[bold]blue[").mkdir()
    Image.new("RGB", (8, 8), "blue").save(folder / "[bold]blue[/nothing].png")
    (folder / "odd.png").write_text("no picture")
    return folder


def test_predict_prints_classes_as_lines_and_as_json(colour_bundle: Path, pictures: Path) -> None:
    red, blue = pictures / "red.png", pictures / "[bold]blue[/nothing].png"
    lines = invoke("predict", colour_bundle, red, blue, "--top", "1")
    assert lines.exit_code == 0, lines.output
    first, first_class, second, second_class = lines.stdout.splitlines()
    assert (first, second) == (str(red), str(blue))
    assert (first_class.split()[1], second_class.split()[1]) == ("red", "blue")
    document = invoke("predict", colour_bundle, red, blue, "--top", "1", "--json")
    assert document.exit_code == 0
    predictions = json.loads(document.stdout)["predictions"]
    assert [entry["image"] for entry in predictions] == [str(red), str(blue)]
    assert [entry["classes"][0]["class"] for entry in predictions] == ["red", "blue"]


def test_predict_classifies_the_readable_images_and_fails_for_the_others(colour_bundle: Path, pictures: Path) -> None:
    result = invoke("predict", colour_bundle, pictures / "odd.png", pictures / "red.png", "--json")
    assert result.exit_code == 1
    assert f"{pictures / 'odd.png'}: " in result.stderr
    odd, red = json.loads(result.stdout)["predictions"]
    assert "error" in odd
    assert red["classes"][0]["class"] == "red"


def test_predict_prints_a_class_as_it_is_named(
    write_bundle: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    names = ["[red]", "a [/b] c", ":dog: " + "of a very long name " * 20 + "indeed"]
    bundle = write_bundle(tmp_path / "odd", names)
    shown = invoke("predict", bundle, pictures / "red.png").stdout
    assert {line.split(maxsplit=1)[1] for line in shown.splitlines()[1:]} == set(names)


def test_predict_self_test_prints_a_line_for_each_check(referenced_once: Path) -> None:
    shown = invoke("predict", referenced_once, "--self-test")
    assert shown.exit_code == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["tensors", "fp32", "int8"]
    document = json.loads(invoke("predict", referenced_once, "--self-test", "--json", "--precision", "int8").stdout)
    assert (document["passed"], [check["name"] for check in document["checks"]]) == (True, ["tensors", "int8"])


def test_predict_self_test_fails_where_this_machine_differs(
    referenced_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "logits", lambda self, images: np.zeros((1, 3), np.float32))
    shown = invoke("predict", referenced_once, "--self-test")
    assert shown.exit_code == 1
    assert "differs from its reference on this machine: odd, portrait, rotated, grey" in shown.stderr


def test_predict_self_test_of_an_older_bundle_is_one_error(colour_bundle: Path) -> None:
    shown = invoke("predict", colour_bundle, "--self-test")
    assert (shown.exit_code, shown.stdout, shown.stderr.count("\n")) == (1, "", 1)


def test_predict_benchmark_prints_the_rows(referenced_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(cell: Any, _open: object) -> GraphRow:
        return GraphRow(cell.precision, cell.threads, cell.batch, Times(2.0, 3.0, 10), None)

    monkeypatch.setattr(benchmark, "_measured", stand_in)
    monkeypatch.setattr(benchmark, "usable_cores", lambda: 2)
    options = ("--benchmark", "--seconds", "0", "--precision", "int8")
    lines = invoke("predict", referenced_once, *options).stdout.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["int8"] * 4
    document = json.loads(invoke("predict", referenced_once, *options, "--json").stdout)
    assert [(row["threads"], row["batch"]) for row in document["rows"]] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    absent = invoke("predict", referenced_once, "absent.png", *options)
    assert (absent.exit_code, "absent.png: No such file" in absent.stderr) == (1, True)


def test_predict_on_a_damaged_bundle_names_the_file(colour_bundle: Path, pictures: Path) -> None:
    (colour_bundle / "classes.txt").write_text("cat\ndog\ncow\n")
    result = invoke("predict", colour_bundle, pictures / "red.png")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {colour_bundle / 'classes.txt'}: is not the file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "digits", "--fresh", "--precompute"), "--fresh and --precompute cannot be combined"),
        (("export", "student.pt", "--gate", "int8.cosine=0.9"), "should be PRECISION.LIMIT=VALUE"),
        (("export", "student.pt", "--gate", "int4.cosine_min=0.9"), "should be PRECISION.LIMIT=VALUE"),
        (("export", "student.pt", "--gate", "int8.cosine_min=much"), "'much' is not a number"),
        (("export", "student.pt", "--gate", "text.difference_max=1"), "only the limits cosine_min, agreement_min"),
        (
            ("export", "student.pt", "--gate", "text.top1_loss_max_points=1"),
            "only the limits cosine_min, agreement_min",
        ),
        (("export", "student.pt", "--opset", "12"), "12 is not in the range x>=13"),
        (("export", "student.pt", "--batch", "0"), "0 is not in the range x>=1"),
        (("export", "student.pt", "--input", "jpeg"), "'jpeg' is not one of 'pixels', 'image'"),
        (("export", "student.pt", "--precision", "int4"), "'int4' is not one of"),
    ],
)
def test_misuse_of_newer_options_is_exit_2(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
