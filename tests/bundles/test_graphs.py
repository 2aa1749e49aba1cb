import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from comkd_cli.bundles import graphs
from comkd_cli.bundles.graphs import (
    GraphForm,
    TextEncoder,
    add_classifier,
    check_graph,
    export_image_encoder,
    export_text_encoder,
    opset_of,
    reraise_system_error,
)
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import ExportError
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import encode_classes
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.recipe import model as recipe
from comkd_cli.teachers.prompted import prompted_clip
from tests import tiny
from tests.exported import export_once

CONVOLUTIONAL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}
TIMM = {
    "embed_dim": 12,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "test_efficientnet",
        "timm_pool": "avg",
        "timm_proj": "none",
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_export_of_a_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Several tests look at the same export."""
    with pytest.MonkeyPatch.context() as patch:
        export_once(patch, tmp_path_factory.mktemp("exported"))
        yield


def make_student(
    config: dict[str, object], prompts: recipe.Prompts | None = None, memory: str = "training"
) -> tuple[Student, Preprocessing]:
    settings = recipe.Student(config=config, train="full", prompts=prompts)
    tower = build_image_tower(settings, seed=1)
    torch.manual_seed(1)
    vectors = nn.functional.normalize(torch.randn(5, 16), dim=1)
    attention = recipe.EduAttention(gate_start=0.5, memory=memory)  # type: ignore[arg-type]
    student = Student(tower.module, tower.width, vectors, torch.tensor(30.0), settings, attention)
    for _ in range(3):  # norms with statistics of their own
        student.train()(torch.randn(8, 3, tower.preprocessing.size, tower.preprocessing.size))
    return student.eval(), tower.preprocessing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "prompts"),
    [
        (tiny.TOWER, None),
        (tiny.TOWER, recipe.Prompts(tokens=2, depth=1)),
        (CONVOLUTIONAL, None),
        (TIMM, None),
    ],
    ids=["vit", "prompted vit", "open_clip resnet", "timm convnet"],
)
def test_graphs_answer_as_the_student_at_any_batch_size(
    config: dict[str, object], prompts: recipe.Prompts | None, tmp_path: Path
) -> None:
    student, preprocessing = make_student(config, prompts)
    encoder, classifier = tmp_path / "encoder.onnx", tmp_path / "classifier.onnx"
    export_image_encoder(student, preprocessing, encoder)
    add_classifier(encoder, classifier, student.class_vectors.numpy(), float(student.logit_scale))
    for path in (encoder, classifier):
        check_graph(path, standard_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.onnx", "encoder.onnx"]
    for size in (1, 2, 7):
        images = torch.randn(size, 3, preprocessing.size, preprocessing.size)
        with torch.no_grad():
            expected = student(images)
        (features,) = run(encoder, image=images.numpy())
        (logits,) = run(classifier, image=images.numpy())
        assert np.allclose(features, expected.features.numpy(), atol=1e-4)
        assert np.allclose(logits, expected.logits.numpy(), atol=1e-3)


def run(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    found: list[np.ndarray] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)
    return found


@pytest.mark.slow
def test_with_candidates_the_class_vectors_are_an_input_of_any_length(tmp_path: Path) -> None:
    student, preprocessing = make_student(tiny.TOWER, memory="candidates")
    encoder, classifier = tmp_path / "encoder.onnx", tmp_path / "classifier.onnx"
    export_image_encoder(student, preprocessing, encoder)
    add_classifier(encoder, classifier, student.class_vectors.numpy(), float(student.logit_scale))
    check_graph(classifier, standard_only=True)
    for batch, classes in ((1, 1), (3, 2), (2, 9)):
        images = torch.randn(batch, 3, preprocessing.size, preprocessing.size)
        vectors = nn.functional.normalize(torch.randn(classes, 16), dim=1)
        with torch.no_grad():
            expected = student(images, vectors)
        given = {"image": images.numpy(), "class_vectors": vectors.numpy()}
        assert np.allclose(run(encoder, **given)[0], expected.features.numpy(), atol=1e-4)
        assert np.allclose(run(classifier, **given)[0], expected.logits.numpy(), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("prompted", [False, True])
def test_the_text_encoder_gives_the_class_vectors_for_any_number_of_texts(tmp_path: Path, prompted: bool) -> None:
    clip = build_clip(recipe.Model(config=tiny.CLIP), seed=2)
    if prompted:
        prompted_clip(clip, vision_depth=1, text_depth=1, tokens=2, seed=3)
    path = tmp_path / "text.onnx"
    export_text_encoder(TextEncoder(clip.model), 10, path)
    check_graph(path, standard_only=True)
    tokens = clip.tokenize([f"a photo of a {name}." for name in ("cat", "dog", "red fox", "owl", "yak", "ant", "emu")])
    with torch.no_grad():
        expected = encode_classes(clip.model, tokens).numpy()
    for count in (1, 2, 7):
        assert np.allclose(run(path, tokens=tokens[:count].numpy())[0], expected[:count], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "opset"),
    [(tiny.TOWER, 13), (tiny.TOWER, 16), (tiny.TOWER, 18), (CONVOLUTIONAL, 13), (TIMM, 13)],
    ids=["vit 13", "vit 16", "vit 18", "open_clip resnet 13", "timm convnet 13"],
)
def test_older_opsets_have_their_own_operators_and_the_same_answers(
    config: dict[str, object], opset: int, tmp_path: Path
) -> None:
    student, preprocessing = make_student(config)
    path = tmp_path / "g.onnx"
    export_image_encoder(student, preprocessing, path, GraphForm(opset))
    check_graph(path, standard_only=True)  # also that the opset has each operator
    assert opset_of(path) == opset
    # Runtimes of their time refuse a newer file format; ONNX's Versioning.md lists them.
    assert onnx.load(path).ir_version == {13: 7, 16: 8, 18: 8}[opset]
    images = torch.randn(3, 3, preprocessing.size, preprocessing.size)
    with torch.no_grad():
        expected = student(images).features.numpy()
    assert np.allclose(run(path, image=images.numpy())[0], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "memory", "form"),
    [
        (tiny.TOWER, "training", GraphForm(20, batch=1)),
        (tiny.TOWER, "candidates", GraphForm(13, batch=3)),
        (CONVOLUTIONAL, "training", GraphForm(13, batch=1)),
    ],
    ids=["vit", "candidates", "open_clip resnet"],
)
def test_a_fixed_batch_leaves_no_shape_open(
    config: dict[str, object], memory: str, form: GraphForm, tmp_path: Path
) -> None:
    student, preprocessing = make_student(config, memory=memory)
    encoder, classifier = tmp_path / "encoder.onnx", tmp_path / "classifier.onnx"
    export_image_encoder(student, preprocessing, encoder, form)
    add_classifier(encoder, classifier, student.class_vectors.numpy(), float(student.logit_scale))
    check_graph(classifier, standard_only=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(classifier), strict_mode=True, data_prop=True).graph
    entries = (*graph.input, *graph.output, *graph.value_info)
    assert len(entries) >= len(graph.node)
    assert all(axis.HasField("dim_value") for entry in entries for axis in entry.type.tensor_type.shape.dim)
    assert {node.op_type for node in graph.node}.isdisjoint({"Shape", "Range", "ConstantOfShape", "NonZero"})
    images = torch.randn(form.batch or 0, 3, preprocessing.size, preprocessing.size)
    given = {"image": images.numpy()}
    if memory == "candidates":
        given["class_vectors"] = student.class_vectors.numpy()
    with torch.no_grad():
        expected = student(images).logits.numpy()
    assert np.allclose(run(classifier, **given)[0], expected, atol=1e-3)


@pytest.mark.slow
def test_a_graph_tells_nothing_of_the_machine_that_made_it(tmp_path: Path) -> None:
    student, preprocessing = make_student(tiny.TOWER)
    export_image_encoder(student, preprocessing, tmp_path / "g.onnx")
    content = (tmp_path / "g.onnx").read_bytes()
    for trace in (b"site-packages", b".py", str(Path.home()).encode(), b"stack_trace"):
        assert trace not in content


@pytest.mark.slow
def test_operators_outside_the_standard_are_refused_if_only_those_are_allowed(tmp_path: Path) -> None:
    student, preprocessing = make_student(tiny.TOWER)
    path = tmp_path / "g.onnx"
    export_image_encoder(student, preprocessing, path)
    model = onnx.load(path)
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    model.graph.node.append(onnx.helper.make_node("Odd", ["image"], ["odd"], domain="com.example"))
    onnx.save(model, path)
    with pytest.raises(ExportError) as caught:
        check_graph(path, standard_only=True)
    assert (caught.value.path, caught.value.found) == ("g.onnx", "com.example")


@pytest.mark.slow
def test_what_torch_cannot_follow_is_an_error(tmp_path: Path) -> None:
    student, preprocessing = make_student(tiny.TOWER)

    class Untraceable(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 12) if images.sum().item() > 0 else images.flatten(1)[:, :12]

    student.backbone = Untraceable()
    with pytest.raises(ExportError, match="torch could not export this model to ONNX") as caught:
        export_image_encoder(student, preprocessing, tmp_path / "g.onnx", GraphForm(18))
    assert (caught.value.path, caught.value.field) == ("g.onnx", "opset 18")


def test_a_graph_that_onnx_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([onnx.helper.make_node("Relu", ["a"], ["b"])], "", [], [])), path
    )
    with pytest.raises(ExportError, match="is not a valid ONNX graph") as caught:
        check_graph(path, standard_only=True)
    assert caught.value.path == "g.onnx"


def test_more_weights_than_one_file_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_BYTES", 1000)
    student, preprocessing = make_student(tiny.TOWER)
    with pytest.raises(ExportError, match="do not fit into one ONNX file") as caught:
        export_image_encoder(student, preprocessing, tmp_path / "g.onnx")
    assert caught.value.path == "g.onnx"
    assert not (tmp_path / "g.onnx").exists()


def test_errors_of_the_system_are_no_failures_of_a_graph() -> None:
    reraise_system_error(OSError("could not get source code"))  # torch's, which has no number
    reraise_system_error(ValueError("shape"))
    with pytest.raises(OSError, match="No space"):
        reraise_system_error(OSError(errno.ENOSPC, "No space left on device"))
