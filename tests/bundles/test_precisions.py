"""The order of the ways to int8, from figures that are given."""

from pathlib import Path

import numpy as np
import pytest

from comkd_cli.bundles import precisions
from comkd_cli.bundles.gates import Gate
from comkd_cli.bundles.precisions import QuantisationImages, to_int8

GATE = Gate(cosine_min=0.98, agreement_min_percent=98.0, top1_loss_max_points=1.0)
IMAGES, HEAD = np.zeros((20, 3, 2, 2), np.float32), np.eye(2, dtype=np.float32)
EXACT = np.tile(np.float32([1, 0]), (20, 1))


def turned(degrees: float, images: int = 20) -> np.ndarray:
    """Features of which some are turned from those of the float graph."""
    features = EXACT.copy()
    angle = np.deg2rad(degrees)
    features[:images] = [np.cos(angle), np.sin(angle)]
    return features


def ranked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: dict[str, np.ndarray],
    sizes: dict[str, int] | None = None,
    seconds: dict[str, float] | None = None,
) -> list[precisions.Quantisation]:
    """The ways, best first, that have these features, bytes (a source has 1000) and seconds."""
    source = tmp_path / "source.onnx"
    source.write_bytes(b"x" * 1000)
    made = {name: tmp_path / f"{name}.onnx" for name in features}
    for name, path in made.items():
        path.write_bytes(b"x" * (sizes or {}).get(name, 250))

    def answers(graph: Path, batches: dict[str, np.ndarray], *_: object) -> dict[str, np.ndarray]:
        whole = EXACT if graph == source else features[graph.stem]
        return {name: whole[int(name) : int(name) + len(batch)] for name, batch in batches.items()}

    monkeypatch.setattr(precisions, "run_graph", answers)
    monkeypatch.setattr(
        precisions, "single_thread_timings", lambda *_: {name: (seconds or {}).get(name, 0.001) for name in features}
    )
    return [way for way, _ in precisions._ranked(source, made, IMAGES, HEAD, GATE, {})]


def test_the_closest_of_small_and_fast_ways_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ranked(tmp_path, monkeypatch, {"far": turned(4), "near": turned(1), "slow": turned(0)}, seconds={"slow": 1})
    assert [way.method for way in ways] == ["near", "far", "slow"]
    assert ways[1].cosine_mean == pytest.approx(np.cos(np.deg2rad(4)))


def test_a_way_that_misses_the_gates_limits_comes_last_however_close_its_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image far off hardly moves the mean, and the gate looks at the worst image."""
    ways = ranked(
        tmp_path,
        monkeypatch,
        {"one off": turned(30, images=1), "all a little": turned(7), "large": turned(5)},
        sizes={"large": 900},
    )
    assert [way.method for way in ways] == ["all a little", "large", "one off"]
    assert ways[2].cosine_min == pytest.approx(np.cos(np.deg2rad(30)))
    assert ways[2].cosine_mean > ways[0].cosine_mean


def test_answers_that_differ_count_as_well_as_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ranked(tmp_path, monkeypatch, {"other answer": turned(46, images=1), "same": turned(44, images=1)})
    assert [way.agreement_percent for way in ways if way.method == "other answer"] == [95.0]


def test_features_that_are_no_numbers_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = EXACT.copy()
    odd[3] = np.nan
    ways = ranked(tmp_path, monkeypatch, {"odd": odd, "turned": turned(20)})
    assert [way.method for way in ways] == ["turned", "odd"]
    assert ways[1].cosine_min == -1


def test_a_full_disk_is_no_fault_of_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(precisions, "_prepare", full)
    with pytest.raises(OSError, match="No space left"):
        to_int8(tmp_path / "source.onnx", QuantisationImages(IMAGES, IMAGES), HEAD, GATE, {})
    monkeypatch.setattr(precisions, "_prepare", lambda source, target: target.write_bytes(b""))
    monkeypatch.setattr(precisions, "_static", full)
    with pytest.raises(OSError, match="No space left"):
        to_int8(tmp_path / "source.onnx", QuantisationImages(IMAGES, IMAGES), HEAD, GATE, {})
