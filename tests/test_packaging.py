"""What is uploaded to an index: it builds, its metadata is valid, and it works without the checkout."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from datetime import date
from pathlib import Path

import pytest
from packaging.version import Version

from comkd_cli.recipe import bundled_recipes

ROOT = Path(__file__).parents[1]
(VERSION,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def python(*arguments: object, cwd: Path, **env: str) -> str:
    """The output of a new interpreter, which must succeed."""
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return folder


@pytest.mark.slow
def test_the_metadata_is_valid_on_an_index(built: Path) -> None:
    python("-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)


def test_the_wheel_has_every_file_of_the_package_and_the_recipes(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    package = (path for path in (ROOT / "comkd_cli").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    wanted = {str(path.relative_to(ROOT)) for path in package}
    wanted |= {f"comkd_cli/bundled_recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert wanted <= names
    assert {name.partition("/")[0] for name in names} == {"comkd_cli", f"comkd-{VERSION}.dist-info"}


def test_the_wheel_works_without_the_checkout(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    here = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "site")}
    origin = python("-c", "import comkd_cli; print(comkd_cli.__file__)", **here)  # type: ignore[arg-type]
    assert Path(origin.strip()).is_relative_to(tmp_path)
    listed = python("-m", "comkd_cli", "recipes", "list", **here)  # type: ignore[arg-type]
    assert all(name in listed for name in bundled_recipes())


def test_the_sdist_has_what_builds_and_tests_it(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "mkdocs.yml", "docs/start.md", "tests/test_packaging.py", "recipes/digits.yaml"} <= names


def test_version_and_changelog_agree() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    released = others if first[0] == "Unreleased" else [first, *others]
    versions = [Version(version) for version, _ in released]
    assert versions == sorted(versions, reverse=True)
    assert [str(date.fromisoformat(day)) for _, day in released] == [day for _, day in released]
    tags = subprocess.run(["git", "tag", "--list", "v*"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert {tag.removeprefix("v") for tag in tags.stdout.split()} <= {version for version, _ in released}
    # Before its release a version is that of the section Unreleased, and newer than every released one.
    assert VERSION in dict(released) or (
        first[0] == "Unreleased" and all(Version(VERSION) > other for other in versions)
    )
