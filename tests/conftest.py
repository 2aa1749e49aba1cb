"""Fixtures of many tests: the command line as a process, small images, a small bundle, a small recipe."""

import hashlib
import json
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from comkd_cli.runtime.imports import defer_compiler
from tests import collector

collector.pause()  # until the first test
# Before anything imports torch: several processes of pytest-xdist, with a thread for every core each, would compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the command line does: torch's compiler takes half of the time of the imports, and few tests use it.
defer_compiler()
# With COMKD_REQUIRE_TOOLS=1, as .ci/run sets it, a test whose tool is not installed fails instead of being skipped.
REQUIRE_TOOLS = "COMKD_REQUIRE_TOOLS"


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose tools are not installed, or fail it where they are required."""
    needed = [name for mark in item.iter_markers("needs_tool") for name in mark.args]
    absent = [name for name in needed if not any(map(shutil.which, name.split("|")))]
    if not absent:
        return
    reason = f"{', '.join(name.split('|')[0] for name in absent)} is not installed"
    if os.environ.get(REQUIRE_TOOLS) == "1":
        pytest.fail(f"{reason}, and {REQUIRE_TOOLS}=1 requires it", pytrace=False)
    pytest.skip(reason)


# The files that take longest, from the longest. tests/test_xdist.py holds that they exist.
LONGEST = (
    "tests/test_docs.py",
    "tests/test_together.py",
    "tests/flows/test_export.py",
    "tests/test_kills.py",
    "tests/test_evaluate_runs.py",
    "tests/test_whole_runs.py",
    "tests/test_suite_runs.py",
    "tests/bundles/test_graphs.py",
    "tests/data/test_loaders.py",
    "tests/runtime/test_collectives.py",
    "tests/test_reproduce.py",
    "tests/test_hostile.py",
    "tests/test_parallel_runs.py",
    "tests/test_fresh_runs.py",
    "tests/test_full_disk.py",
    "tests/recipe/test_bundled.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first, then those with most slow tests, so that no worker of pytest-xdist is left alone
    with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    places = {config.rootpath / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path, len(places)), -slow[item.path]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage again, now that the test modules are imported, but for their objects."""
    collector.resume()
    # Accelerator.free_memory collects it all at the end of each training, and the tests have hundreds.
    if memory := sys.modules.get("accelerate.utils.memory"):
        memory.gc = SimpleNamespace(collect=lambda: 0)  # type: ignore[attr-defined]


def pytest_unconfigure(config: pytest.Config) -> None:
    """End a run with the number of skipped tests and the reasons, so that `passed` hides none of them.

    pytest-xdist's workers have no reporter; the process that started them has the reports of them all.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        summary = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
        reporter.write_line(f"{len(skipped)} tests were skipped: {summary}", yellow=True)


# The same examples in every run, and no deadline, since machines differ in speed.
settings.register_profile("comkd", deadline=None, derandomize=True, database=None)
settings.load_profile("comkd")


LEFT_SECONDS = 20.0  # a loader's worker looks for a parent that was killed every 5 s
SESSION = "COMKD_TEST_SESSION"
# Processes of libraries that end with this one.
OF_LIBRARIES = ("multiprocessing.resource_tracker", "torch/_inductor/compile_worker")


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the run if its end has a process, a thread or a lock more than its start. Each worker of pytest-xdist looks
    for its own."""
    earlier = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch:
        # Processes inherit the variable, also those whose parent has ended.
        patch.setenv(SESSION, f"{os.getpid()}-{time.time_ns()}")
        yield
        deadline = time.monotonic() + LEFT_SECONDS
        while (left := _left(os.environ[SESSION], earlier)) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not left, f"left behind by the tests: {'; '.join(left)}"


def _left(session: str, earlier: set[threading.Thread]) -> list[str]:
    """A line for each thing that the tests of this process left. Pools of libraries keep their threads."""
    new = [thread for thread in threading.enumerate() if thread not in earlier and not thread.daemon]
    return [
        *(f"thread {thread.name}" for thread in new if not thread.name.startswith("ThreadPoolExecutor-")),
        *(f"process {line}" for line in _processes_of(session)),
        *(f"lock {line}" for line in _locks_of(os.getpid())),
    ]


def _processes_of(session: str) -> Iterator[str]:
    """The processes with this value of SESSION, but for this one and those of multiprocessing that end with it."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    marker = f"{SESSION}={session}".encode()
    for entry in Path("/proc").glob("[0-9]*"):  # there is none on other systems than Linux
        try:
            if int(entry.name) in (os.getpid(), server) or marker not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended, or belongs to somebody else
            continue
        if line and not any(name in line for name in OF_LIBRARIES):  # a zombie has no command line
            yield f"{entry.name}: {line}"


def _locks_of(process: int) -> list[str]:
    """What the system says of the locks that a process holds."""
    file = Path("/proc/locks")
    lines = file.read_text().splitlines() if file.is_file() else []
    return [line for line in lines if line.split()[1:2] == ["FLOCK"] and line.split()[4] == str(process)]


@pytest.fixture(scope="session", autouse=True)
def signals_enabled() -> Iterator[None]:
    """Tests send signals to themselves and to child processes; a shell starts background jobs with SIGINT ignored, and
    nohup its command with SIGHUP ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.fixture(scope="session")
def run_comkd() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a new interpreter: run_comkd("predict", bundle, image, cwd=folder).

    Commands that import torch start faster with tests/warm.py.
    """

    def run(
        *arguments: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "comkd_cli", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="module")
def few_digits() -> Iterator[None]:
    """The dataset `digits` has the images of tiny.few_digits for the tests of a module."""
    from tests import tiny

    with pytest.MonkeyPatch.context() as patch:
        tiny.few_digits(patch)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of pytest, the same for all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def onnx_files(shared: Path) -> Path:
    """What torch exported for any test; see `export_once`."""
    folder = shared / "exported"
    folder.mkdir(exist_ok=True)
    return folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels, so that any shift or rotation is detected."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session", name="noise")
def noise_fixture() -> Callable[..., Image.Image]:
    """An image of random pixels: noise(width, height, seed=0)."""
    return noise


@pytest.fixture(scope="session")
def write_image() -> Callable[..., Path]:
    """Writes a small image and creates its folder: write_image(path, seed=0, size=(12, 9)) returns the path."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (12, 9), **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(*size, seed).save(path, **options)
        return path

    return write


@pytest.fixture
def minimal_recipe() -> dict[str, Any]:
    """The required fields of a recipe, as plain data."""
    return {
        "data": {"dataset": "digits"},
        "teacher": {"arch": "ViT-L-14", "weights": "openai"},
        "student": {"arch": "ViT-B-32", "weights": "openai"},
    }


PIXELS = {"size": 8, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
COLOUR_WEIGHTS = np.array([[5.0, -1.0, 0.5], [-1.0, 5.0, 0.25], [0.0, -2.0, 5.0]], dtype=np.float32)
COLOUR_BIAS = np.array([0.125, -0.25, 0.5], dtype=np.float32)


@pytest.fixture(scope="session")
def write_bundle() -> Callable[..., Path]:
    """Writes a bundle that classifies red, green and blue images; it is made without torch.

    Its logits are COLOUR_WEIGHTS times the mean of each normalised channel, plus COLOUR_BIAS.
    """
    from onnx import TensorProto, helper, numpy_helper

    def write(folder: Path, class_names: Sequence[str] = ("red", "green", "blue")) -> Path:
        size = PIXELS["size"]
        graph = helper.make_graph(
            [
                helper.make_node("ReduceMean", ["image"], ["means"], axes=[2, 3], keepdims=0),
                helper.make_node("Gemm", ["means", "weights", "bias"], ["logits"], transB=1),
            ],
            "colours",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
            [
                numpy_helper.from_array(COLOUR_WEIGHTS, "weights"),
                numpy_helper.from_array(COLOUR_BIAS, "bias"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        folder.mkdir(parents=True)
        (folder / "classifier.onnx").write_bytes(model.SerializeToString())
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
        files = {
            name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
            for name in ("classifier.onnx", "classes.txt")
        }
        graphs = {"classifier": "classifier.onnx", "image_encoder": "classifier.onnx"}
        manifest = {
            "format": "comkd-bundle/1",
            "preprocessing": PIXELS,
            "files": files,
            "precisions": {"fp32": graphs},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return write


@pytest.fixture
def colour_bundle(tmp_path: Path, write_bundle: Callable[..., Path]) -> Path:
    """A bundle that classifies red, green and blue images; see write_bundle."""
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(scope="session")
def referenced_once(tmp_path_factory: pytest.TempPathFactory, write_bundle: Callable[..., Path]) -> Path:
    """The bundle of colours with its reference/; not to be changed."""
    from tests.referenced import add_reference

    return add_reference(write_bundle(tmp_path_factory.mktemp("referenced") / "bundle"))


@pytest.fixture
def referenced(referenced_once: Path, tmp_path: Path) -> Path:
    """A copy of the bundle of colours with its reference/."""
    return shutil.copytree(referenced_once, tmp_path / "bundle")
