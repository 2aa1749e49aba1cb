"""The figures of a latency measurement, from given rounds."""

from pathlib import Path
from typing import Any

import pytest

from comkd_cli.bundles import latency
from comkd_cli.bundles.latency import Contender, disturbance, measure_latency, measured_batch, single_thread_timings
from comkd_cli.errors import ExportError


def test_one_thread_and_all_cores_are_measured_and_the_spread_is_that_of_the_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = {
        ("pytorch", 1): [[4.0, 4.0, 9.0], [4.0, 4.0, 4.0], [4.0, 4.0, 4.0]],
        ("fp32", 1): [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]],
    }

    def alternate(_: object, counts: list[int], *__: object) -> dict[tuple[str, int], list[dict[str, Any]]]:
        assert counts == [1, 6]
        return {key: [{"seconds": seconds, "peak_bytes": 100} for seconds in found] for key, found in rounds.items()}

    monkeypatch.setattr(latency, "_alternate", alternate)
    monkeypatch.setattr(latency, "usable_cores", lambda: 6)
    pytorch, fp32 = measure_latency(Path("student.pt"), [Contender("fp32", Path("g.onnx"))], 8, {})
    assert (pytorch.spread, fp32.spread) == (1, 3)
    assert (fp32.seconds, fp32.speed_up) == (2, 2)


@pytest.mark.parametrize(("batch", "head"), [(None, "batch 1"), (1, "batch 1"), (8, "share of batch 8")])
def test_a_table_says_that_a_fixed_batch_was_measured(batch: int | None, head: str) -> None:
    assert measured_batch({"batch": batch}) == head


def test_rounds_that_differ_are_reported() -> None:
    steady = {"name": "fp32", "threads": 1, "spread": 1.2}
    assert disturbance([]) is None
    assert disturbance([steady]) is None
    sentence = disturbance([steady, {"name": "int8", "threads": 2, "spread": 1.84}])
    assert sentence is not None
    assert sentence.startswith("The rounds differ by up to 1.8 times (int8, threads: 2): other programs were running.")


def test_a_graph_that_cannot_be_run_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"the benchmark failed: .*InvalidProtobuf") as caught:
        single_thread_timings([Contender("int8", tmp_path / "broken.onnx")], 8, {})
    assert caught.value.path == "broken.onnx"
