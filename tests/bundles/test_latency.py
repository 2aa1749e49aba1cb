"""What is said of a latency measurement, from rounds that are given."""

from pathlib import Path
from typing import Any

import pytest

from comkd_cli.bundles import latency
from comkd_cli.bundles.latency import Contender, disturbance, measure_latency


def test_the_spread_is_the_slowest_rounds_median_over_the_fastest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {
        ("pytorch", 1): [[4.0, 4.0, 9.0], [4.0, 4.0, 4.0], [4.0, 4.0, 4.0]],
        ("fp32", 1): [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]],
    }

    def in_turns(*_: object) -> dict[tuple[str, int], list[dict[str, Any]]]:
        return {key: [{"seconds": seconds, "peak_bytes": 100} for seconds in found] for key, found in rounds.items()}

    monkeypatch.setattr(latency, "_in_turns", in_turns)
    pytorch, fp32 = measure_latency(Path("student.pt"), [Contender("fp32", Path("g.onnx"))], 8, {})
    assert (pytorch.spread, fp32.spread) == (1, 3)
    assert (fp32.seconds, fp32.speed_up) == (2, 2)


def test_rounds_that_differ_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = {"name": "fp32", "threads": 1, "spread": 1.2}
    assert disturbance([]) is None
    assert disturbance([steady]) is None
    said = disturbance([steady, {"name": "int8", "threads": 2, "spread": 1.84}])
    assert said is not None
    assert said.startswith("The rounds differ by up to 1.8 times (int8, threads: 2): other programs were running.")
