"""Nodes that prepare images, against edge/images.py, which Pillow resizes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image
from sklearn.datasets import load_sample_image

from comkd_cli.bundles.graphs import check_graph
from comkd_cli.bundles.inputs import add_input, check_inputs, input_file, write_front
from comkd_cli.edge.images import Preprocessing, prepare, resize_and_crop
from comkd_cli.errors import ExportError

SIZE = 20
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
# Upright, wide, larger, smaller, nearly square, halved exactly, and so tall that Pillow resizes its columns first.
SIZES = [(31, 47), (64, 45), (200, 133), (7, 9), (9, 7), (21, 20), (20, 21), (40, 40), (20, 20), (33, 190), (201, 23)]


def write_graph(path: Path, opset: int = 18, batch: int | str = "batch", vectors: bool = False) -> Path:
    """The mean of a prepared image's pixels per channel, plus that of the class vectors if it has them."""
    nodes = [helper.make_node("GlobalAveragePool", ["image"], ["mean"])]
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat" if vectors else "image_features"]))
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])]
    if vectors:
        nodes.append(helper.make_node("Add", ["flat", "class_vectors"], ["image_features"]))
        inputs.append(helper.make_tensor_value_info("class_vectors", TensorProto.FLOAT, [1, 3]))
    output = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, [batch, 3])
    graph = helper.make_graph(nodes, "g", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7), path)
    return path


def run(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.mark.parametrize(
    ("interpolation", "most_percent"),
    # In float32, weights of a linear filter give many exact halves, which Pillow's integers round either way.
    [("bicubic", 0.1), ("bilinear", 1.0)],
)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_images_of_any_size_are_resized_as_pillow_does(
    interpolation: str, most_percent: float, resize_mode: str, photo: Image.Image, tmp_path: Path
) -> None:
    preprocessing = Preprocessing(SIZE, MEAN, STD, interpolation, resize_mode)
    write_front("image", write_graph(tmp_path / "g.onnx"), tmp_path / "front.onnx", preprocessing)
    session = onnxruntime.InferenceSession(tmp_path / "front.onnx", providers=["CPUExecutionProvider"])
    std = np.float32(STD).reshape(3, 1, 1)
    gaps = []
    for size in SIZES:
        image = photo.resize(size)
        (found,) = session.run(None, {"pixels": np.asarray(image)[None]})[0]
        gaps.append(np.rint(255 * std * np.abs(found - prepare(image, preprocessing))))
    assert max(gap.max() for gap in gaps) <= 1
    assert 100 * np.mean(np.stack(gaps) > 0) <= most_percent


def test_prepared_pixels_are_the_same_numbers(photo: Image.Image, tmp_path: Path) -> None:
    preprocessing = Preprocessing(SIZE, MEAN, STD)
    write_front("pixels", write_graph(tmp_path / "g.onnx", opset=13), tmp_path / "front.onnx", preprocessing)
    images = [photo.resize(size) for size in SIZES]
    pixels = np.stack([np.asarray(resize_and_crop(image, preprocessing)) for image in images])
    expected = np.stack([prepare(image, preprocessing) for image in images])
    assert np.array_equal(run(tmp_path / "front.onnx", pixels=pixels), expected)


@pytest.mark.parametrize("kind", ["pixels", "image"])
def test_a_batch_of_equal_sizes_goes_through_the_whole_graph(kind: str, photo: Image.Image, tmp_path: Path) -> None:
    preprocessing = Preprocessing(SIZE, MEAN, STD)
    graph = write_graph(tmp_path / "g.int8.onnx", vectors=True)
    target = input_file(graph, kind)
    assert target.name == f"g.{kind}.int8.onnx"
    add_input(kind, graph, target, preprocessing)
    size = (SIZE, SIZE) if kind == "pixels" else (50, 37)
    images = [photo.resize(size), photo.rotate(180).resize(size)]
    vectors = np.float32([[1, 2, 3]])
    found = run(target, pixels=np.stack([np.asarray(image) for image in images]), class_vectors=vectors)
    expected = np.stack([prepare(image, preprocessing).mean(axis=(1, 2)) for image in images]) + vectors
    np.testing.assert_allclose(found, expected, atol=1e-3)
    (pixels, _) = onnx.load(target).graph.input
    sides = [axis.dim_param or axis.dim_value for axis in pixels.type.tensor_type.shape.dim]
    assert sides == ["batch", *([SIZE, SIZE] if kind == "pixels" else ["height", "width"]), 3]


def test_the_fixed_batch_of_a_graph_stays(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "g.onnx", opset=13, batch=2)
    add_input("pixels", graph, tmp_path / "pixels.onnx", Preprocessing(SIZE, MEAN, STD))
    check_graph(tmp_path / "pixels.onnx", standard_only=True)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "pixels.onnx"), strict_mode=True, data_prop=True)
    entries = (*model.graph.input, *model.graph.value_info)
    assert all(axis.HasField("dim_value") for entry in entries for axis in entry.type.tensor_type.shape.dim)


@pytest.mark.parametrize(
    ("kinds", "opset", "batch", "web", "field"),
    [
        (["image"], 17, None, False, "--opset"),
        ([], 99, None, False, "--opset"),
        (["pixels", "image"], 20, 1, False, "--input"),
        ([], 20, 2, True, "--batch"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kinds: list[str], opset: int, batch: int | None, web: bool, field: str
) -> None:
    with pytest.raises(ExportError) as caught:
        check_inputs(kinds, opset, batch, web)
    assert caught.value.field == field


def test_what_goes_together_is_not() -> None:
    check_inputs(["image", "pixels"], 18, None, True)
    check_inputs(["pixels"], 13, 1, True)
    check_inputs(["pixels"], 13, 4, False)
