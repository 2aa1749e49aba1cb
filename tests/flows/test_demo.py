"""The demo's summary, from the files of a run as the commands write them."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from comkd_cli.data.digits import digits_source
from comkd_cli.flows.evaluate import Bench, evaluate
from comkd_cli.flows.export import export
from comkd_cli.results.records import to_json


@pytest.mark.slow
def test_the_summary_tells_what_the_run_wrote(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = importlib.util.spec_from_file_location("demo", Path(__file__).parents[2] / "examples/demo.py")
    assert specification is not None
    assert specification.loader is not None
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    bench = Bench(torch.device("cpu"), Path("data"), lambda event: None)
    results = evaluate(str(tiny_student), tmp_path, bench)
    (tmp_path / "results.json").write_text(to_json(results))
    manifest = export(tiny_student, tmp_path / "bundle", Path("data"), lambda event: None).manifest
    test = digits_source().test
    assert test is not None
    test.open(0).save(tmp_path / "one.png")
    monkeypatch.setattr(demo, "RUN", tmp_path)
    table = demo.summary({str(tmp_path / "one.png"): str((test.labels or ())[0])}, 1.0)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    student = results.records[0]
    difference = manifest["precisions"]["fp32"]["parity"]["feature_difference_max"]
    for figure in (f"{student.top1_percent:.2f} %", f"{difference:.1e}", f"{student.image_tower_parameters:,}", "of 1"):
        assert figure in text
