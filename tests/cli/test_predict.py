"""`comkd predict` with a threshold, and the options of `comkd export` that set it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from comkd_cli.cli.app import main


def comkd(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture
def limited(colour_bundle: Path, tmp_path: Path) -> Path:
    """The bundle of three colours with a threshold, beside a red and a grey picture."""
    path = colour_bundle / "manifest.json"
    threshold = {"score": "max_probability", "value": 0.9, "classes": {}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "threshold": threshold}))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8), (250, 10, 20)).save(tmp_path / "photos/red.png")
    Image.new("RGB", (8, 8), (128, 105, 78)).save(tmp_path / "photos/grey.png")
    return colour_bundle


def test_none_of_these_is_printed_above_the_classes_unless_it_is_turned_off(limited: Path, tmp_path: Path) -> None:
    images = [tmp_path / "photos/red.png", tmp_path / "photos/grey.png"]
    printed = comkd("predict", limited, *images, "--top", 1)
    assert printed.exit_code == 0
    assert [line.split()[:3] == ["none", "of", "these:"] for line in printed.output.splitlines()] == [
        *(False, False),
        *(False, True, False),
    ]
    off = comkd("predict", limited, *images, "--top", 1, "--no-threshold")
    assert "none of these" not in off.output


def test_json_says_it_in_a_field_of_each_record(limited: Path, tmp_path: Path) -> None:
    arguments = ["predict", limited, tmp_path / "photos/red.png", tmp_path / "photos/grey.png", "--json"]
    for options, expected in (((), [False, True]), (("--no-threshold",), [None, None])):
        records = json.loads(comkd(*arguments, *options).stdout)["predictions"]
        assert [record["none_of_these"] for record in records] == expected


def test_the_table_has_its_column(limited: Path, tmp_path: Path) -> None:
    arguments = ["predict", limited, tmp_path / "photos", "--csv", tmp_path / "out.csv", "--top", 1]
    assert comkd(*arguments).exit_code == 0
    header, grey, red = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "path,class,probability,none_of_these,error"
    assert [row.split(",")[3] for row in (grey, red)] == ["true", "false"]
    refused = comkd(*arguments, "--no-threshold")
    assert refused.exit_code == 1
    assert "threshold" in refused.stderr


@pytest.mark.parametrize("option", [("--accept", "0"), ("--accept", "100"), ("--negatives", "no such folder")])
def test_a_share_or_a_folder_that_cannot_be_is_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    assert comkd("export", tmp_path / "student.pt", *option).exit_code == 2
