"""The site builds without a warning, and the commands of its pages run as they are written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from ruamel.yaml import YAML

from comkd_cli.data.digits import digits_source
from comkd_cli.recipe import load_recipe, parse_recipe
from tests import tiny, warm
from tests.shell import assert_parsed, lines_of, words_of

ROOT = Path(__file__).parents[1]
START = ROOT / "docs/start.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
LONG = 1800  # seconds; a training beside other work, as pytest-xdist runs it, may take many times its processor time
# Titles of blocks that are not run, and what such a block must hold.
NOT_RUN = {
    "Install": r"^(pip|make) ",
    "Needs pretrained weights": r"^comkd .*(classes\.txt|recipe\.yaml|few\.yaml|foxes|released\.yaml|vitl_|ViT-)",
    "Needs the datasets": r"--data-root",
    "Needs a network": r"^hf |OWNER/NAME|--web",
    "Needs several GPUs": r"(torchrun|accelerate launch) .*-m comkd_cli ",
    "A benchmark": r"-m benchmarks\.| --benchmark|importtime",
}
# Blocks that tests of their own run, by page and language.
RUN_ELSEWHERE = {
    ("docs/python.md", "python"): "tests/test_package.py",
    ("docs/bundle.md", "sh"): "tests/bundles/test_other_languages.py",
    ("docs/bundle.md", "cpp"): "tests/bundles/test_other_languages.py",
    ("docs/bundle.md", "js"): "tests/bundles/test_other_languages.py",
    ("docs/cli.md", "text"): "tests/cli/test_examples.py",
}
PROGRAM = re.compile(r"(?:\$ )?(?:\w+=\S+ )*(?:comkd|python3?|pip|make|torchrun|accelerate|pytest|hf|npm|node|git) ")
OPTION = re.compile(r"(?<= )--[a-z][a-z-]*")

# What a recipe has beside the fields that an untitled block shows.
REST = {
    "data": {"folder": "photos", "classes": "classes.txt"},
    "teacher": {"arch": "ViT-B-16-quickgelu", "weights": "openai"},
    "student": {"arch": "ViT-B-16-quickgelu", "weights": "openai", "train": "prompts"},
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str | None
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and self.title not in NOT_RUN


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    return [Block(*found.group(1, 2, 3)) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def to_follow(page: Path) -> list[Block]:
    """The blocks that a reader runs, and the files that they save."""
    saved = [block for block in blocks(page) if block.runs or (block.language == "yaml" and block.title)]
    elsewhere = [language for of_page, language in RUN_ELSEWHERE if of_page == name_of(page)]
    return [block for block in saved if block.language not in elsewhere]


FOLLOWED = [page for page in PAGES if page != START and any(block.runs for block in to_follow(page))]
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def run_line(line: str, folder: Path) -> None:
    """A command of a page, as a shell would run it; several export the same student, which torch does once."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "comkd":
        exported = folder.with_name("exported")
        exported.mkdir(exist_ok=True)
        ended = warm.run(*arguments, cwd=folder, timeout=LONG, digits=tiny.DIGITS // 2, exported=exported)
    else:
        assert program == "python", line
        ended = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"


def follow(page: Path, folder: Path) -> None:
    """Save the files of a page and run its blocks, in its order."""
    for language, title, text in to_follow(page):
        if language == "yaml":
            assert title
            (folder / title).write_text(text, encoding="utf-8")
        elif language == "bash":
            for line in lines_of(text):
                run_line(line, folder)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.syspath_prepend("device")  # the bundle of the guide to devices
                exec(compile(text, name_of(page), "exec"), {"__name__": "page"})
                sys.modules.pop("predict", None)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader with images of their own who has followed the start page; every other page is followed in
    it, too."""
    folder = tmp_path_factory.mktemp("reader")
    tiny.digits_folder(folder / "pictures", 240, 40)
    unlabelled = tiny.digits_folder(folder / "scans", 240, 40) / "train/unlabelled"
    unlabelled.mkdir()
    for image in sorted((folder / "scans/train").glob("*/*.png"), key=lambda path: path.name)[:160]:
        image.replace(unlabelled / image.name)
    (folder / "photos").mkdir()
    for index, name in enumerate(("a.png", "b.png", "fox.jpg", "photos/IMG_0001.jpg", "photos/IMG_0002.jpg")):
        digits_source().train.open(index).save(folder / name)
    follow(START, folder)
    shutil.copy(folder / "runs/recipe/pictures/seed1/student.pt", folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(LONG)
def test_the_start_page_can_be_followed_to_the_letter(workshop: Path) -> None:
    """By the fixture; what the page says a reader then has."""
    assert (workshop / "runs/digits/digits/seed1/report.html").is_file()
    assert (workshop / "runs/digits/digits/seed1/bundle/predict.py").is_file()
    assert (workshop / "predictions.csv").read_text().count("\n") == 1 + 40


@pytest.mark.slow
@pytest.mark.timeout(LONG)
@pytest.mark.parametrize("page", FOLLOWED, ids=name_of)
def test_a_page_can_be_followed_to_the_letter(page: Path, workshop: Path) -> None:
    follow(page, workshop)


@each_page
def test_every_block_has_a_kind(page: Path) -> None:
    """It is run here or by a test of its own, says in its title why not, or shows what nobody types."""
    text, found = page.read_text(encoding="utf-8"), blocks(page)
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found)
    for block in found:
        elsewhere = RUN_ELSEWHERE.get((name_of(page), block.language))
        if elsewhere:
            assert name_of(page) in (ROOT / elsewhere).read_text(encoding="utf-8")
        elif block.language in ("bash", "python"):
            assert block.title is None or re.search(NOT_RUN[block.title], joined(block.text), re.MULTILINE)
        elif block.language == "text":
            assert not any(PROGRAM.match(line) for line in lines_of(block.text))
        else:
            assert block.language == "yaml"
    indented = re.findall(r"^(?: {4,}|\t)(\S.*)$", BLOCK.sub("", text), re.MULTILINE)
    assert not [line for line in indented if PROGRAM.match(line)], "commands belong in a block of bash"


def joined(text: str) -> str:
    return "\n".join(lines_of(text))


@each_page
def test_every_command_exists(page: Path) -> None:
    """Run or not: comkd's parser takes it, and benchmarks and targets of make have what it names."""
    for block in blocks(page):
        for line in lines_of(block.text) if block.language == "bash" else ():
            if words_of(line):
                assert_parsed(line)
            words = shlex.split(line, comments=True)
            for module in (word for word in words if word.startswith("benchmarks.")):
                below = ROOT / module.replace(".", "/")
                files = sorted(below.glob("*.py")) or [below.with_suffix(".py")]
                source = "".join(file.read_text(encoding="utf-8") for file in files)
                for option in OPTION.findall(" ".join(words)):
                    assert f'"{option}"' in source, line
            if words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), line


@each_page
def test_the_recipes_of_a_page_are_read(page: Path, tmp_path: Path) -> None:
    """A titled one is whole; another shows fields of one."""
    for index, (language, title, text) in enumerate(blocks(page)):
        if language != "yaml":
            continue
        if title is not None:
            (tmp_path / title).write_text(text, encoding="utf-8")
            load_recipe(tmp_path / title)
        else:
            fields = YAML(typ="safe", pure=True).load(text)
            fields.pop("extends", None)
            assert fields, f"block {index}"
            parse_recipe({**REST, **fields})


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """In strict mode a broken link, a missing anchor and a page outside the navigation are warnings, which fail."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stderr
    built = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"}
    assert built == {name_of(path).removeprefix("docs/") for path in PAGES} - {"README.md"}
