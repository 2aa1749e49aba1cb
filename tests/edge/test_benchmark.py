"""A bundle's measurement of itself: the statistics, the rows, and processes that fail. Nothing is timed here."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comkd_cli.bundles.standalone import standalone_predictor
from comkd_cli.edge import benchmark, classifier
from comkd_cli.edge.benchmark import Benchmark, BenchmarkJob, GraphRow, Times, run_benchmark
from comkd_cli.edge.images import UnreadableImage
from comkd_cli.edge.machine import usable_cores
from comkd_cli.edge.manifest import BundleProblem


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=60))
def test_the_median_and_the_95th_percentile_are_numpys(seconds: list[float]) -> None:
    times = Times.of(seconds)
    assert times.median_ms == pytest.approx(1e3 * np.median(seconds))
    assert times.p95_ms == pytest.approx(1e3 * np.percentile(seconds, 95, method="inverted_cdf"))
    assert times.runs == len(seconds)


@pytest.mark.slow
def test_predict_py_prints_every_row_with_finite_positive_figures(colour_bundle: Path, tmp_path: Path) -> None:
    (colour_bundle / "predict.py").write_text(standalone_predictor())
    command = [sys.executable, "-I", str(colour_bundle / "predict.py"), "--benchmark", "--json", "--seconds", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    document = json.loads(finished.stdout)
    assert document["cpu"]
    assert set(document["versions"]) == {"python", "onnxruntime", "pillow", "numpy", "machine"}
    rows = document["rows"]
    threads = sorted({1, document["cores"]})
    assert [(row["precision"], row["threads"], row["batch"]) for row in rows] == list(
        product(["fp32"], threads, [1, 8])
    )
    for row in rows:
        for figure in ("median_ms", "p95_ms", "images_per_second", "peak_bytes"):
            assert math.isfinite(row[figure])
            assert row[figure] > 0
        assert row["p95_ms"] >= row["median_ms"]
        assert row["runs"] == 10
        assert row["peak_bytes"] > 20e6  # Python, numpy and onnxruntime alone take more
    prepared = document["preprocessing"]
    assert prepared["image"] == "a JPEG of 1280 x 960 pixels"
    assert 0 < prepared["median_ms"] <= prepared["p95_ms"]


def row(precision: str, threads: int, batch: int, peak: int | None = 3 * 2**20) -> GraphRow:
    return GraphRow(precision, threads, batch, Times(2.0 * batch, 3.0 * batch, 10), peak)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cells that were requested; each is measured as `row`."""
    cells: list[Any] = []

    def stand_in(cell: Any, _open: object) -> GraphRow:
        cells.append(cell)
        return row(cell.precision, cell.threads, cell.batch)

    monkeypatch.setattr(benchmark, "_measured", stand_in)
    monkeypatch.setattr(benchmark, "usable_cores", lambda: 4)
    return cells


def test_each_precision_runs_at_one_thread_and_at_all_with_one_image_and_eight(
    referenced_once: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert classifier.main(["--bundle", str(referenced_once), "--benchmark", "--seconds", "0"]) == 0
    expected = list(product(["fp32", "int8"], [1, 4], [1, 8]))
    assert [(cell.precision, cell.threads, cell.batch) for cell in measured] == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(", 4 cores")
    assert [tuple(line.split()[:3]) for line in lines[3:]] == [(p, str(t), str(b)) for p, t, b in expected]
    assert lines[3].split()[3:] == ["2.00", "3.00", "500.0", "3"]


def test_one_precision_and_an_image_of_the_users(
    referenced_once: Path, measured: list[Any], tmp_path: Path, noise: Any
) -> None:
    noise(40, 30).save(tmp_path / "mine.png")
    steps: list[tuple[int, int]] = []
    found = run_benchmark(
        BenchmarkJob(referenced_once, "int8", str(tmp_path / "mine.png"), 0),
        classifier.Classifier,
        lambda done, total: steps.append((done, total)),
    )
    assert {cell.precision for cell in measured} == {"int8"}
    assert found.image == f"{tmp_path / 'mine.png'} (40 x 30 pixels)"
    assert found.preprocessing.runs == 10
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(UnreadableImage, match="absent"):
        run_benchmark(BenchmarkJob(referenced_once, None, str(tmp_path / "absent.png")), classifier.Classifier)


def test_memory_that_the_system_does_not_tell_is_null() -> None:
    found = Benchmark("a CPU", 1, "an image", Times(1, 1, 10), [row("fp32", 1, 1, peak=None)])
    assert found.document()["rows"][0]["peak_bytes"] is None
    assert found.text().splitlines()[0] == "a CPU, 1 core"
    assert found.text().splitlines()[-1].split()[-1] == "-"


def ends_its_process(*_: object, **__: object) -> Any:
    """Stands for a graph on which onnxruntime crashes."""
    os._exit(3)


@pytest.mark.slow
def test_a_graph_that_ends_its_process_is_named(colour_bundle: Path) -> None:
    with pytest.raises(BundleProblem) as caught:
        run_benchmark(BenchmarkJob(colour_bundle, seconds=0), ends_its_process)
    assert caught.value.problem == (
        "could not be timed (fp32, threads: 1, batch: 1): its process ended with exit status 3"
    )


@pytest.mark.slow
def test_the_error_of_a_process_is_the_commands(colour_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (colour_bundle / "classifier.onnx").write_bytes(b"another file")
    assert classifier.main(["--bundle", str(colour_bundle), "--benchmark", "--seconds", "0"]) == 1
    assert "classifier.onnx: is not the file that was exported" in capsys.readouterr().err


def test_an_interrupted_measurement_exits_with_130(referenced_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "_measured", interrupted)
    assert classifier.main(["--bundle", str(referenced_once), "--benchmark", "--seconds", "0"]) == 130


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
