"""The site builds without a warning, and the commands of its pages run as they are written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from comkd_cli.data.digits import digits_source
from comkd_cli.recipe import parse_recipe
from tests import warm
from tests.tiny import digits_folder

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = [DOCS / "start.md", *sorted((DOCS / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]*)\")?.*\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
NOT_RUN = ("Install", "Needs pretrained weights")


def blocks(page: Path) -> list[tuple[str, str | None, str]]:
    """The fenced blocks of a page: language, title, text."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(block["language"], block["title"], block["text"]) for block in found]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader follows the pages one after the other, with images of their own."""
    folder = tmp_path_factory.mktemp("reader")
    digits_folder(folder / "pictures", 240, 40)
    unlabelled = digits_folder(folder / "scans", 240, 40) / "train/unlabelled"
    unlabelled.mkdir()
    for image in sorted((folder / "scans/train").glob("*/*.png"), key=lambda path: path.name)[:160]:
        image.replace(unlabelled / image.name)
    for index, name in enumerate(("a.png", "b.png")):
        digits_source().train.open(index).save(folder / name)
    return folder


def run_line(line: str, cwd: Path) -> None:
    """A command of a page, as a shell would run it."""
    program, *arguments = shlex.split(line)
    if program == "comkd":
        ended = warm.run(*arguments, cwd=cwd)
    else:
        assert program == "python", line
        ended = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_a_page_can_be_followed_to_the_letter(page: Path, workshop: Path) -> None:
    for language, title, text in blocks(page):
        if title in NOT_RUN:
            continue
        if language == "yaml" and title is not None:
            (workshop / title).write_text(text, encoding="utf-8")
        elif language == "bash":
            for line in text.splitlines():
                run_line(line, workshop)
        elif language == "python":
            code = f"import sys; sys.path.insert(0, 'device')\n{text}"
            subprocess.run([sys.executable, "-c", code], cwd=workshop, check=True)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_block_has_a_kind_that_is_run_or_says_why_not(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(blocks(page))
    for language, title, text in blocks(page):
        assert language in ("bash", "python", "yaml", "text")
        if language == "bash":
            assert title is None or title in NOT_RUN
        elif language == "yaml" and title is not None:  # a whole recipe
            fields = YAML(typ="safe", pure=True).load(text)
            assert "about" in fields
            if "extends" not in fields:
                parse_recipe(fields)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """In strict mode a broken link, a missing anchor and a page outside the navigation are warnings, which fail."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stderr
    built = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"}
    assert built == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
