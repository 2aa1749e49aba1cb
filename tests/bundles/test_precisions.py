"""The order of the quantisation methods, from given figures; fp16 of an old opset."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from comkd_cli.bundles import precisions
from comkd_cli.bundles.gates import Gate
from comkd_cli.bundles.latency import Timing
from comkd_cli.bundles.lowering import lower
from comkd_cli.bundles.precisions import OPTIMIZATION, QuantisationImages, Quantiser, to_fp16
from comkd_cli.edge.session import start_session

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
    timings: dict[str, Timing] | None = None,
) -> list[precisions.Quantisation]:
    """The methods, the best first, for given features, bytes (the source has 1000) and timings."""
    source = tmp_path / "source.onnx"
    source.write_bytes(b"x" * 1000)
    graphs = {name: tmp_path / f"{name}.onnx" for name in features}
    for name, path in graphs.items():
        path.write_bytes(b"x" * (sizes or {}).get(name, 250))

    def outputs(graph: Path, batches: dict[str, np.ndarray], *_: object) -> dict[str, np.ndarray]:
        whole = EXACT if graph == source else features[graph.stem]
        return {name: whole[int(name) : int(name) + len(batch)] for name, batch in batches.items()}

    given = {name: (timings or {}).get(name, Timing(0.001, 0.001, 0.001)) for name in ("fp32", *features)}
    monkeypatch.setattr(precisions, "run_graph", outputs)
    monkeypatch.setattr(precisions, "single_thread_timings", lambda *_: given)
    quantiser = Quantiser(QuantisationImages(IMAGES, IMAGES), HEAD, GATE, {})
    return [figures for figures, _ in quantiser.rank(source, graphs)]


def test_the_closest_of_small_and_fast_methods_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"far": turned(4), "near": turned(1), "slow": turned(0)}
    methods = ranked(tmp_path, monkeypatch, features, timings={"slow": Timing(1, 1, 1)})
    assert [method.method for method in methods] == ["near", "far", "slow"]
    assert methods[1].cosine_mean == pytest.approx(np.cos(np.deg2rad(4)))


def test_a_method_that_misses_the_gates_limits_comes_last_however_close_its_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image hardly moves the mean, but the gate has a limit for the worst image."""
    methods = ranked(
        tmp_path,
        monkeypatch,
        {"one off": turned(30, images=1), "all a little": turned(7), "large": turned(5)},
        sizes={"large": 900},
    )
    assert [method.method for method in methods] == ["all a little", "large", "one off"]
    assert methods[2].cosine_min == pytest.approx(np.cos(np.deg2rad(30)))
    assert methods[2].cosine_mean > methods[0].cosine_mean


@pytest.mark.parametrize(
    ("slower", "first"),
    [
        (Timing(0.0011, 0.0011, 0.0011), "near"),
        (Timing(0.0012, 0.0012, 0.0012), "far"),
        # Its fastest round is within 10 % of the slowest round of the other: not reproducibly slower.
        (Timing(0.0020, 0.0013, 0.0030), "near"),
        (Timing(0.0020, 0.0014, 0.0030), "far"),
    ],
)
def test_a_difference_of_speed_counts_if_it_exceeds_that_of_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: Timing, first: str
) -> None:
    fast = Timing(0.001, 0.001, 0.001 if slower.median < 0.002 else 0.0012)
    timings = {"far": fast, "near": slower}
    methods = ranked(tmp_path, monkeypatch, {"far": turned(4), "near": turned(1)}, timings=timings)
    assert methods[0].method == first


@pytest.mark.parametrize(
    ("timing", "speed_up", "slower"),
    [
        (Timing(0.0005, 0.0004, 0.0006), 2.0, False),
        # Its fastest round is as fast as the slowest round of fp32: slower here may be the load of the machine.
        (Timing(0.002, 0.0012, 0.003), 0.5, False),
        (Timing(0.002, 0.0013, 0.003), 0.5, True),
    ],
)
def test_a_method_that_is_slower_than_fp32_in_every_round_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timing: Timing, speed_up: float, slower: bool
) -> None:
    timings = {"fp32": Timing(0.001, 0.0009, 0.0012), "int8": timing}
    (method,) = ranked(tmp_path, monkeypatch, {"int8": turned(1)}, timings=timings)
    assert method.speed_up == pytest.approx(speed_up)
    assert method.slower is slower


def test_methods_that_are_equal_stay_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ranked(tmp_path, monkeypatch, {name: turned(2) for name in ("c", "a", "b")})
    assert [method.method for method in methods] == ["c", "a", "b"]


def test_top1_agreement_counts_as_well_as_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ranked(tmp_path, monkeypatch, {"other class": turned(46, images=1), "same": turned(44, images=1)})
    assert {method.method: method.agreement_percent for method in methods} == {"same": 100.0, "other class": 95.0}


def test_features_that_are_not_finite_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = EXACT.copy()
    odd[3] = np.nan
    methods = ranked(tmp_path, monkeypatch, {"odd": odd, "turned": turned(20)})
    assert [method.method for method in methods] == ["turned", "odd"]
    assert methods[1].cosine_min == -1


@pytest.mark.parametrize("step", ["prepare_graph", "_static"])
def test_a_full_disk_is_no_failure_of_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(precisions, "prepare_graph", lambda source, target: target.write_bytes(b""))
    monkeypatch.setattr(precisions, step, full)
    quantiser = Quantiser(QuantisationImages(IMAGES, IMAGES), HEAD, GATE, {})
    with pytest.raises(OSError, match="No space left"):
        quantiser.quantise(tmp_path / "source.onnx", lambda event: None)


def test_a_norm_of_large_activations_survives_fp16_in_an_old_opset(tmp_path: Path) -> None:
    """Its squares exceed float16's 65,504; a LayerNormalization of later opsets computes them in float32 itself."""
    nodes = [
        helper.make_node("Mul", ["image", "thousand"], ["large"]),
        helper.make_node("LayerNormalization", ["large", "scale", "bias"], ["y"], axis=-1),
    ]
    values = {"thousand": np.float32(1000), "scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(lower(model, 13), tmp_path / "source.onnx")
    to_fp16(tmp_path / "source.onnx", tmp_path / "target.onnx")
    image = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    centred = image - image.mean(axis=1, keepdims=True)
    session = start_session((tmp_path / "target.onnx").read_bytes(), threads=1, optimization=OPTIMIZATION["fp16"])
    (found,) = session.run(None, {"image": image})
    np.testing.assert_allclose(found, centred / centred.std(axis=1, keepdims=True), atol=0.01)
