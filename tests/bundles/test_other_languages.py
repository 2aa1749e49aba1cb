"""The programs of docs/bundle.md in C++ and JavaScript, built and run as they stand there."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from comkd_cli.bundles.web import VERSION

PAGE = Path(__file__).parents[2] / "docs/bundle.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comkd"
HEADERS = (CACHE / "onnxruntime-headers", Path("/usr/include/onnxruntime"))  # the first is .ci/run's
NAMES = ["odd", "portrait", "rotated", "grey", "palette", "cmyk", "deep", "photo"]

Check = Callable[..., subprocess.CompletedProcess[str]]


def section(title: str, language: str) -> str:
    """The first block in a language after a heading of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n### {title}\n")[2]
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} has no {language} under {title}"
    return found[1]


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    env = {**os.environ, **variables}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=250)


def needed(found: object, what: str) -> None:
    """Skip a test without what it needs, or fail it where the tools of tests are required."""
    if not found and os.environ.get("COMKD_REQUIRE_TOOLS") == "1":
        pytest.fail(f"{what} not found, and COMKD_REQUIRE_TOOLS=1 requires it")
    if not found:
        pytest.skip(f"{what} not found; .ci/run fetches them")


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """The C++ program: cpp(bundle, precision, tensors...)."""
    headers = next((folder for folder in HEADERS if (folder / "onnxruntime_cxx_api.h").is_file()), None)
    libraries = list((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    needed(headers, "the headers of onnxruntime were")
    needed(libraries, "the library of onnxruntime was")
    assert headers is not None
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "ort/lib").mkdir(parents=True)
    (folder / "ort/include").symlink_to(headers)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "ort/lib" / name).symlink_to(libraries[0])
    (folder / "check.cpp").write_text(section("In C++", "cpp"), encoding="utf-8")
    build = section("In C++", "sh").splitlines()[0]
    built = run("sh", "-c", f"{build} -Wall -Wextra -Werror", cwd=folder, ORT=str(folder / "ort"))
    assert built.returncode == 0, built.stderr
    return lambda *arguments: run(folder / "check", *arguments, cwd=folder)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """The JavaScript program: javascript(bundle, precision). npm installs its runtime once, into the user's cache."""
    modules = CACHE / f"node-onnxruntime-web-{VERSION}"
    if not (modules / "node_modules/onnxruntime-web/package.json").is_file():
        install = (
            section("In JavaScript", "sh").splitlines()[0].replace("onnxruntime-web", f"onnxruntime-web@{VERSION}")
        )
        modules.mkdir(parents=True, exist_ok=True)
        done = run("sh", "-c", f"{install} --ignore-scripts --loglevel=error", cwd=modules)
        assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("javascript")
    (folder / "node_modules").symlink_to(modules / "node_modules")
    (folder / "check.mjs").write_text(section("In JavaScript", "js"), encoding="utf-8")
    return lambda *arguments: run("node", "check.mjs", *arguments, cwd=folder)


LANGUAGES = [
    pytest.param("cpp", marks=[pytest.mark.slow, pytest.mark.needs_tool("g++")]),
    pytest.param("javascript", marks=[pytest.mark.slow, pytest.mark.needs_tool("node"), pytest.mark.needs_tool("npm")]),
]


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Check:
    program: Check = request.getfixturevalue(request.param)
    return program


@pytest.mark.parametrize("check", LANGUAGES, indirect=True)
def test_the_program_agrees_with_the_reference(check: Check, referenced_once: Path) -> None:
    done = check(referenced_once, "fp32")
    assert done.returncode == 0, done.stderr
    assert [re.split(r"[ :]", line)[:2] for line in done.stdout.splitlines()] == [["fp32", name] for name in NAMES]
    assert done.stdout.count("ok") == len(NAMES)


@pytest.mark.parametrize("check", LANGUAGES, indirect=True)
def test_the_program_fails_where_a_logit_differs(check: Check, referenced: Path) -> None:
    path = referenced / "reference/reference.json"
    document = json.loads(path.read_text())
    document["logits"]["fp32"]["values"][3][1] += 1
    path.write_text(json.dumps(document))
    np.save(referenced / "reference/logits.fp32.npy", np.float32(document["logits"]["fp32"]["values"]))
    done = check(referenced, "fp32")
    assert done.returncode == 1, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "FAILED" in line] == ["fp32 grey"]


@pytest.mark.slow
@pytest.mark.needs_tool("g++")
def test_the_cpp_program_checks_the_tensors_of_other_code(cpp: Check, referenced_once: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(referenced_once / "reference", tmp_path / "mine")
    tensor = np.load(mine / "odd.npy")
    np.save(mine / "odd.npy", tensor + 1e-3)
    done = cpp(referenced_once, "fp32", mine)
    assert (done.returncode, done.stdout.count("ok")) == (0, 16)
    np.save(mine / "odd.npy", tensor[:, ::-1].copy())  # blue first
    np.save(mine / "deep.npy", np.zeros((1, 3, 2, 2), np.float32))
    np.save(mine / "photo.npy", tensor * np.float32("nan"))
    done = cpp(referenced_once, "fp32", mine)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "FAILED" in line] == ["odd", "deep", "photo"]


@pytest.mark.slow
@pytest.mark.needs_tool("g++")
def test_the_cpp_program_names_what_it_cannot_read(cpp: Check, tmp_path: Path) -> None:
    done = cpp(tmp_path, "fp32")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path}/reference/reference.json could not be read\n")
