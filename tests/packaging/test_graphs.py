from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from comkd_cli.backbones import build_image_tower
from comkd_cli.errors import ExportError
from comkd_cli.method.student import Student
from comkd_cli.packaging.bundle import opset_of
from comkd_cli.packaging.graphs import ImageClassifier, ImageEncoder, export_graph
from comkd_cli.predictor import Preprocessing
from comkd_cli.recipe import model as recipe
from tests import tiny

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


def make_student(config: dict[str, object], prompts: recipe.Prompts | None = None) -> tuple[Student, Preprocessing]:
    settings = recipe.Student(config=config, train="full", prompts=prompts)
    tower = build_image_tower(settings, seed=1)
    torch.manual_seed(1)
    vectors = nn.functional.normalize(torch.randn(5, 16), dim=1)
    attention = recipe.EduAttention(gate_start=0.5)
    student = Student(tower.module, tower.width, vectors, torch.tensor(30.0), settings, attention)
    for _ in range(3):  # norms with statistics of their own
        student.train()(torch.randn(8, 3, tower.preprocessing.size, tower.preprocessing.size))
    return student.eval(), tower.preprocessing


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
    export_graph(ImageEncoder(student), preprocessing, "image_features", encoder)
    export_graph(ImageClassifier(student), preprocessing, "logits", classifier)
    for path in (encoder, classifier):
        onnx.checker.check_model(path, full_check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.onnx", "encoder.onnx"]
    for size in (1, 2, 7):
        images = torch.randn(size, 3, preprocessing.size, preprocessing.size)
        with torch.no_grad():
            expected = student(images)
        for path, name, value in (
            (encoder, "image_features", expected.features),
            (classifier, "logits", expected.logits),
        ):
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (answer,) = session.run([name], {"image": images.numpy()})
            assert np.allclose(answer, value.numpy(), atol=1e-4), name


def test_the_opset_is_read_from_the_graph(tmp_path: Path) -> None:
    student, preprocessing = make_student(tiny.TOWER)
    export_graph(ImageEncoder(student), preprocessing, "image_features", tmp_path / "g.onnx")
    assert opset_of(tmp_path / "g.onnx") >= 18


def test_what_torch_cannot_follow_is_an_error(tmp_path: Path) -> None:
    class Untraceable(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image * float(image.sum().item() > 0) if image.sum().item() > 0 else image

    with pytest.raises(ExportError, match="can't export"):
        export_graph(Untraceable(), Preprocessing(4, (0, 0, 0), (1, 1, 1)), "out", tmp_path / "g.onnx")
