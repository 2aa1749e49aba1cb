"""That the benchmarks still run against the code; what they measure is not tested."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    *sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"),
    *sorted(f"{path.parent.name}.__main__" for path in (ROOT / "benchmarks").glob("*/__main__.py")),
]


@pytest.mark.parametrize("name", MODULES)
def test_each_benchmark_loads_and_says_its_own_command(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main)
    assert f"python -m benchmarks.{name.removesuffix('.__main__')}" in module.__doc__


def test_the_loaders_ratios_are_quotients_of_the_rates_beside_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--images", "8", "--side", "48", "--batch", "4", "--workers", "0", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["loader", *sizes])
    importlib.import_module("benchmarks.loader").main()
    document = json.loads(capsys.readouterr().out)
    rates, ratios = document["images_per_second"], document["over_torchvision"]
    assert set(rates) == set(ratios) > {"torchvision", "comkd"}
    assert all(rate > 0 for rate in rates.values())
    assert ratios == pytest.approx({name: rate / rates["torchvision"] for name, rate in rates.items()})
    assert document["images_of_an_epoch"] == dict.fromkeys(rates, 8)  # all did the same work
    assert document["mean_file_bytes"] > 0
