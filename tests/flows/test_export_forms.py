"""Bundles for other runtimes: graphs that prepare their images, older opsets, fixed shapes; and OpenVINO."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from PIL import Image

from comkd_cli.bundles import input_parity, parity
from comkd_cli.bundles.bundle import graph_name
from comkd_cli.bundles.gates import GATES, Gate
from comkd_cli.bundles.graphs import opset_of
from comkd_cli.bundles.metadata import metadata_of
from comkd_cli.bundles.parity import Reference, measure_parity
from comkd_cli.data.digits import digits_source
from comkd_cli.edge.classifier import Classifier
from comkd_cli.edge.fixed_batch import run_in_batches
from comkd_cli.edge.images import prepare, resize_and_crop
from comkd_cli.edge.manifest import BundleProblem
from comkd_cli.edge.session import start_session
from comkd_cli.errors import ExportError
from comkd_cli.flows.export import ExportOptions, export
from comkd_cli.models.checkpoints import load_student

pytestmark = pytest.mark.slow  # each of two bundles takes a while
WIDE = {name: Gate(0.9, 80.0, 20.0, gate.difference_max) for name, gate in GATES.items()}
SIZES = [(30, 44), (51, 20), (16, 16), (9, 11)]


def digits(count: int) -> list[Image.Image]:
    return [digits_source().train.open(i) for i in range(count)]


@pytest.fixture(scope="module")
def prepared(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose graphs also take pixels and images."""
    out = tmp_path_factory.mktemp("out") / "prepared"
    options = ExportOptions(precisions=("fp32", "fp16"), inputs=("image", "pixels"), check_images=64, gates=WIDE)
    exported = export(tiny_student, out, Path("data"), lambda event: None, options=options)
    assert exported.failed == {}
    return out


@pytest.fixture(scope="module")
def fixed(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of fixed shapes in an old opset."""
    out = tmp_path_factory.mktemp("out") / "fixed"
    options = ExportOptions(
        precisions=tuple(GATES),
        inputs=("pixels",),
        check_images=64,
        opset=13,
        batch=2,
        text=True,
        gates=WIDE,
        text_precisions=("fp32",),
    )
    exported = export(tiny_student, out, Path("data"), lambda event: None, options=options)
    assert exported.failed == {}
    return out


def logits(graph: Path, pixels: np.ndarray, optimization: str) -> np.ndarray:
    """optimization: the manifest's, since onnxruntime's extended fusions crash on some fp16 graphs."""
    session = start_session(graph.read_bytes(), threads=1, optimization=optimization)
    return np.asarray(session.run(None, {"pixels": pixels})[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_take_pixels_and_images_of_any_size(prepared: Path, precision: str) -> None:
    entry = json.loads((prepared / "manifest.json").read_text())["precisions"][precision]
    graphs = entry["inputs"]
    assert list(graphs) == ["pixels", "image"]
    classifier = Classifier(prepared, precision=precision)
    for digit, size in zip(digits(len(SIZES)), SIZES, strict=True):
        image = digit.resize(size, Image.Resampling.NEAREST)
        expected = classifier.logits(prepare(image, classifier.preprocessing)[None])
        square = np.asarray(resize_and_crop(image, classifier.preprocessing))
        for kind, pixels in (("pixels", square), ("image", np.asarray(image))):
            found = logits(prepared / graphs[kind]["classifier"], pixels[None], entry["optimization"])
            assert found.argmax() == expected.argmax()
            np.testing.assert_allclose(found, expected, atol=0.1 if kind == "image" else 1e-3)


def test_the_manifest_and_the_card_name_the_graphs_and_their_figures(prepared: Path, tiny_student: Path) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    card = (prepared / "README.md").read_text()
    names = {
        f"{graph}.{kind}{end}.onnx"
        for graph in ("classifier", "image_encoder")
        for kind in ("pixels", "image")
        for end in ("", ".fp16")
    }
    assert names < set(manifest["files"])
    assert all(name in card for name in names)
    fields = metadata_of(onnx.load(prepared / "classifier.pixels.fp16.onnx"))
    assert (fields["kind"], fields["precision"], fields["input"]) == ("classifier", "fp16", "pixels")
    figures = manifest["precisions"]["fp32"]["inputs"]["image"]
    assert figures["levels"]["difference_max"] <= 2
    assert figures["parity"]["top1_agreement_percent"] == 100
    student, _ = load_student(tiny_student)
    assert manifest["edu_attention"]["gate"] == student.gate
    assert (manifest["batch"], manifest["opset"]) == (None, 20)


def test_an_input_that_misses_its_gate_is_left_out(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_parity, "input_gate", lambda kind, precision: Gate(1.1, 99.5, 0.0))
    options = ExportOptions(inputs=("pixels",), check_images=16)
    exported = export(tiny_student, tmp_path / "bundle", Path("data"), lambda event: None, options=options)
    assert list(exported.failed) == ["fp32 with --input pixels"]
    assert "inputs" not in exported.manifest["precisions"]["fp32"]
    assert not list((tmp_path / "bundle").glob("*.pixels.onnx"))
    assert "fp32 with --input pixels is not in the bundle" in (tmp_path / "bundle/README.md").read_text()


def test_an_input_of_any_size_has_no_fixed_shape(tiny_student: Path, tmp_path: Path) -> None:
    options = ExportOptions(inputs=("image",), batch=1)
    with pytest.raises(ExportError) as caught:
        export(tiny_student, tmp_path / "bundle", Path("data"), lambda event: None, options=options)
    assert (caught.value.field, caught.value.found) == ("--input", "image")
    assert list(tmp_path.iterdir()) == []


def test_every_graph_of_a_fixed_bundle_has_the_opset_and_its_shapes(fixed: Path) -> None:
    graphs = sorted(fixed.glob("*.onnx"))
    assert len(graphs) == 2 * 2 * len(GATES) + 1
    for path in graphs:
        assert opset_of(path) == 13
        graph = onnx.load(path).graph
        shapes = [entry.type.tensor_type.shape.dim for entry in (*graph.input, *graph.output)]
        assert all(axis.HasField("dim_value") for shape in shapes for axis in shape)
        assert {shape[0].dim_value for shape in shapes} == {2}
    manifest = json.loads((fixed / "manifest.json").read_text())
    assert (manifest["batch"], manifest["opset"]) == (2, 13)
    assert manifest["precisions"]["fp32"]["parity"]["batch_sizes"] == [2]
    assert "`image` (2, 3, 16, 16)" in (fixed / "README.md").read_text()


def test_predict_py_runs_a_fixed_batch_on_any_number_of_images(fixed: Path, tiny_student: Path) -> None:
    student, record = load_student(tiny_student)
    images = np.stack([prepare(digit, record.preprocessing) for digit in digits(5)])
    with torch.no_grad():
        expected = student(torch.from_numpy(images)).logits.numpy()
    classifier = Classifier(fixed)
    np.testing.assert_allclose(classifier.logits(images), expected, atol=1e-3)
    classifier.add_classes(["red fox", "owl", "bee"])
    np.testing.assert_allclose(classifier.logits(images)[:, :10], expected, atol=1e-3)
    assert classifier.logits(images).shape == (5, 13)


def test_a_fixed_number_of_candidates_takes_no_further_class(fixed: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(fixed, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "memory": "candidates"}))
    with pytest.raises(BundleProblem) as caught:
        Classifier(bundle).add_classes(["red fox"])
    assert (caught.value.field, caught.value.path) == ("batch", bundle / "manifest.json")


class OpenVino:
    """A graph in OpenVINO, with the methods of an onnxruntime session that comkd calls; in float32, as that."""

    def __init__(self, graph: Path) -> None:
        self._compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        (self._input,) = self._compiled.inputs

    def get_inputs(self) -> list[Any]:
        shape = [axis.get_length() if axis.is_static else str(axis) for axis in self._input.get_partial_shape()]
        return [SimpleNamespace(name=self._input.get_any_name(), shape=shape)]

    def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.array(self._compiled(inputs)[0])]


def run_in_openvino(graph: Path, batches: Mapping[str, np.ndarray], *_: Any) -> dict[str, np.ndarray]:
    """As bundles/runner.run_graph."""
    session = OpenVino(graph)
    return {name: run_in_batches(session, batch, {}) for name, batch in batches.items()}


@pytest.mark.parametrize(
    ("form", "precision", "kind"),
    [
        ("prepared", "fp32", None),
        ("prepared", "fp16", None),
        ("prepared", "fp32", "pixels"),
        ("fixed", "fp32", None),
        ("fixed", "fp16", "pixels"),
    ],
)
def test_openvino_passes_the_same_gate(
    form: str,
    precision: str,
    kind: str | None,
    request: pytest.FixtureRequest,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle: Path = request.getfixturevalue(form)
    student, record = load_student(tiny_student)
    squares = [resize_and_crop(digit, record.preprocessing) for digit in digits(70)]
    images = np.stack([prepare(square, record.preprocessing) for square in squares])
    with torch.no_grad():
        expected = student(torch.from_numpy(images))
    given = images if kind is None else np.stack([np.asarray(square) for square in squares])
    length = None if form == "prepared" else 2
    reference = Reference(given, expected.features.numpy(), expected.logits.numpy(), None, batch=length)
    encoder, classifier = (
        bundle / graph_name(graph, precision).replace(".", f".{kind}." if kind else ".", 1)
        for graph in ("image_encoder", "classifier")
    )
    monkeypatch.setattr(parity, "run_graph", run_in_openvino)
    # So small a student changes a class or two in fp16, in onnxruntime too.
    gate = GATES["fp32"] if precision == "fp32" else replace(GATES["fp16"], agreement_min_percent=97)
    assert measure_parity(encoder, classifier, reference).failures(gate) == []
