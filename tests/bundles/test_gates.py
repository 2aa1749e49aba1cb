"""The gate of speed, on given figures."""

from comkd_cli.bundles.gates import SpeedGate


def test_no_limit_passes_everything_and_measures_nothing() -> None:
    assert not SpeedGate().measures
    assert SpeedGate().failures(1e9, 0.0) == []


def test_a_limit_itself_passes() -> None:
    gate = SpeedGate(max_latency_ms=20, min_speedup=1.5)
    assert gate.measures
    assert gate.failures(20.0, 1.5) == []


def test_each_figure_that_misses_is_named_with_its_limit() -> None:
    assert SpeedGate(max_latency_ms=20).failures(20.5, 0.1) == ["20.50 ms for one image on one thread (limit 20 ms)"]
    assert SpeedGate(min_speedup=1.5).failures(99.0, 1.49) == [
        "1.49 times as fast as PyTorch on one thread (limit 1.5)"
    ]
    assert len(SpeedGate(1, 2).failures(float("nan"), float("nan"))) == 2
