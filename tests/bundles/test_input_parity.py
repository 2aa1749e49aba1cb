"""The gate of graphs that prepare their images, with graphs made by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_sample_image

from comkd_cli.bundles import input_parity
from comkd_cli.bundles.input_parity import InputGraphs, cut_to, sizes
from comkd_cli.bundles.parts import Part
from comkd_cli.data.source import ImageSet
from comkd_cli.edge.fixed_batch import run_in_batches
from comkd_cli.edge.images import Preprocessing
from comkd_cli.events import Event, Notice

SIZE, DIM, CLASSES, IMAGES = 8, 6, 4, 3
PREPROCESSING = Preprocessing(SIZE, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
RANDOM = np.random.default_rng(0)
ENCODING, HEAD = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((3 * SIZE**2, DIM), (DIM, CLASSES)))


def crop(key: str) -> Image.Image:
    """A part of a photograph."""
    left = 90 * int(key)
    return Image.fromarray(load_sample_image("flower.jpg")).crop((left, 0, left + 200, 150))


def part(images: int = IMAGES) -> Part:
    pictures = ImageSet(tuple(map(str, range(images))), None, crop)
    return Part(np.empty((images, 3, SIZE, SIZE), np.float32), "given", pictures=pictures)


@pytest.fixture(autouse=True)
def graphs_run_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes a third of a second to start; tests/bundles/test_parity.py has those."""

    def run(graph: Path, batches: Mapping[str, np.ndarray], *_: Any) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        return {name: run_in_batches(session, batch, {}) for name, batch in batches.items()}

    monkeypatch.setattr(input_parity, "run_graph", run)


@pytest.fixture
def graphs(tmp_path: Path) -> tuple[Path, Path]:
    """An encoder, normalised(flatten(image) @ ENCODING), and its classifier, features @ HEAD."""
    for name, output, width in (("encoder", "image_features", DIM), ("classifier", "logits", CLASSES)):
        nodes = [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "encoding"], ["product"]),
            helper.make_node("LpNormalization", ["product"], ["image_features"], axis=1, p=2),
        ]
        head = []
        if output == "logits":
            head.append(numpy_helper.from_array(HEAD, "head"))
            nodes.append(helper.make_node("MatMul", ["image_features", "head"], ["logits"]))
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", width])],
            [numpy_helper.from_array(ENCODING, "encoding"), *head],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, tmp_path / f"{name}.onnx")
    return tmp_path / "encoder.onnx", tmp_path / "classifier.onnx"


def test_graphs_that_prepare_as_the_reference_does_pass(graphs: tuple[Path, Path]) -> None:
    events: list[Event] = []
    inputs = InputGraphs(part(), PREPROCESSING, HEAD, {})
    assert inputs.add(["image", "pixels"], "fp32", graphs, events.append) == {}
    found = inputs.graphs["fp32"]
    assert list(found) == ["pixels", "image"]
    assert (found["pixels"].levels.different_percent, found["pixels"].parity.feature_difference_max) == (0, 0)
    assert found["image"].levels.difference_max <= 1
    assert found["image"].parity.feature_cosine_min > 0.9999
    # Each image as it is, and cut to every size; their copies do not narrow the interval.
    assert found["image"].parity.images == IMAGES * (len(sizes(SIZE)) + 1)
    assert found["image"].parity.different == IMAGES
    document = found["pixels"].document()
    assert (document["image_encoder"], document["classifier"]) == ("encoder.pixels.onnx", "classifier.pixels.onnx")
    assert document["input"] == {"name": "pixels", "type": "uint8", "shape": ["batch", 8, 8, 3], "colours": "RGB"}
    assert found["image"].document()["input"]["shape"] == ["batch", "height", "width", 3]
    assert {path.name for path in graphs[0].parent.glob("*.onnx")} == {
        *(path.name for path in graphs),
        *(f"{name}.{kind}.onnx" for name in ("encoder", "classifier") for kind in ("pixels", "image")),
    }
    assert sum("passes its gate" in event.text for event in events if isinstance(event, Notice)) == 2
    inputs.remove("fp32", graphs)
    assert inputs.graphs == {}
    assert set(graphs[0].parent.glob("*.onnx")) == set(graphs)


def test_graphs_that_resize_otherwise_are_left_out_with_their_figures(
    graphs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the antialiasing filter, as in runtimes that ignore it."""
    add = input_parity.add_input

    def aliased(kind: str, graph: Path, target: Path, preprocessing: Preprocessing) -> None:
        add(kind, graph, target, preprocessing)
        model = onnx.load(target)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "antialias":
                    attribute.i = 0
        onnx.save(model, target)

    monkeypatch.setattr(input_parity, "add_input", aliased)
    inputs = InputGraphs(part(), PREPROCESSING, HEAD, {})
    failed = inputs.add(["pixels", "image"], "fp32", graphs, lambda event: None)
    assert list(failed) == ["fp32 with --input image"]
    assert "(limit 0.9995)" in failed["fp32 with --input image"]
    assert list(inputs.graphs["fp32"]) == ["pixels"]
    assert not list(graphs[0].parent.glob("*.image.*"))


def test_logits_of_another_encoder_are_refused(graphs: tuple[Path, Path]) -> None:
    inputs = InputGraphs(part(), PREPROCESSING, 2 * HEAD, {})
    failed = inputs.add(["pixels"], "fp32", graphs, lambda event: None)
    assert "its logits are not" in failed["fp32 with --input pixels"]
    assert (inputs.graphs, list(graphs[0].parent.glob("*.pixels.*"))) == ({}, [])


def test_without_images_nothing_can_be_checked(graphs: tuple[Path, Path]) -> None:
    failed = InputGraphs(part(0), PREPROCESSING, HEAD, {}).add(["pixels"], "fp32", graphs, lambda event: None)
    assert "there are no images" in failed["fp32 with --input pixels"]


@pytest.mark.parametrize("size", [16, 32, 224])
def test_the_sizes_are_upright_and_wide_larger_and_smaller(size: int) -> None:
    found = sizes(size)
    assert len(set(found)) == len(found)
    assert any(w < h for w, h in found)
    assert any(w > h for w, h in found)
    assert any(min(side) > 2 * size for side in found)
    assert any(max(side) < size for side in found)
    for width, height in found:
        image = cut_to(Image.new("RGB", (13, 10), "red"), width, height)
        assert (image.size, image.getcolors()) == ((width, height), [(width * height, (255, 0, 0))])
