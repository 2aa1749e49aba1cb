"""What graphs say of themselves."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from comkd_cli.bundles.metadata import Origin, metadata_of, write_metadata
from comkd_cli.edge.images import Preprocessing

NAMES = ["cat", "Ünïcode 日", "\udce9 lone", "\x1b[31m red"]
ORIGIN = Origin(
    student_sha256="0" * 64,
    recipe="pets",
    class_names=NAMES,
    templates=["a photo of a {}."],
    preprocessing=Preprocessing(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    logit_scale=14.5,
    temperature=1.25,
    threshold={"score": "max_probability", "value": 0.75, "classes": {"cat": 0.5}, "images": 100},
)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("image", "logits")]
    model = helper.make_model(
        helper.make_graph([helper.make_node("Relu", ["image"], ["logits"])], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = "path", "/home/someone"
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_a_graph_has_all_that_is_needed_to_use_it_alone(graph: Path) -> None:
    write_metadata(graph, ORIGIN.of_image_graph("classifier", "int8"))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    found = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert all(name.startswith("comkd.") for name in found)  # the others are gone
    assert found["comkd.classes"] == NAMES
    assert found["comkd.preprocessing"]["size"] == 8
    assert (found["comkd.kind"], found["comkd.precision"]) == ("classifier", "int8")
    assert (found["comkd.logit_scale"], found["comkd.temperature"]) == (14.5, 1.25)
    assert found["comkd.threshold"] == {"score": "max_probability", "value": 0.75, "classes": {"cat": 0.5}}
    assert found["comkd.templates"] == ["a photo of a {}."]
    assert found["comkd.student_sha256"] == "0" * 64
    assert metadata_of(onnx.load(graph))["classes"] == NAMES
    values = np.array([[-1, 0, 2]], np.float32)
    assert session.run(None, {"image": values})[0].tolist() == [[0, 0, 2]]


def test_a_text_encoder_names_the_prompts_of_new_classes(graph: Path) -> None:
    write_metadata(graph, ORIGIN.of_text_encoder(77, ("a {}.", "the {}"), "fp16"))
    found = metadata_of(onnx.load(graph))
    assert (found["templates"], found["precision"], found["context_length"]) == (["a {}.", "the {}"], "fp16", 77)
    assert (found["kind"], found["student_sha256"]) == ("text_encoder", "0" * 64)


def test_the_same_metadata_give_the_same_bytes(graph: Path) -> None:
    write_metadata(graph, ORIGIN.of_text_encoder(77, ["a {}."], "fp32"))
    first = graph.read_bytes()
    write_metadata(graph, ORIGIN.of_text_encoder(77, ["a {}."], "fp32"))
    assert graph.read_bytes() == first
    assert metadata_of(onnx.load(graph))["context_length"] == 77


def test_the_graph_of_another_program_has_none(graph: Path) -> None:
    assert metadata_of(onnx.load(graph)) == {}


@pytest.mark.parametrize(("value", "problem"), [("fox", "Expecting value"), ("[" * 5000, "nested too deeply")])
def test_damaged_metadata_are_an_error(graph: Path, value: str, problem: str) -> None:
    model = onnx.load(graph)
    model.metadata_props[0].key, model.metadata_props[0].value = "comkd.classes", value
    with pytest.raises(ValueError, match=problem):
        metadata_of(model)
