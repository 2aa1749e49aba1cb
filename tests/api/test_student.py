"""A loaded student: its answers against its module's, what it refuses, and what it saves."""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import comkd_cli as comkd
from comkd_cli.errors import CheckpointError, DataError, MisuseError
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_image_tower, state_sha256
from comkd_cli.models.checkpoints import load_student, save_student
from comkd_cli.recipe import parse_recipe
from tests import tiny

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture
def student(tiny_student: Path) -> comkd.LoadedStudent:
    return comkd.load_student(tiny_student, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """40 images of random pixels and several sizes, so that they are more than a batch."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = [folder / f"{number:02}.png" for number in range(40)]
    for number, path in enumerate(paths):
        Image.fromarray(draw.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).save(path)
    return paths


@torch.no_grad()
def by_hand(student: comkd.LoadedStudent, photos: list[Path]) -> Any:
    module, record = load_student(student.file)
    images = torch.stack([student.transform(path) for path in photos])
    assert images.shape[2] == record.preprocessing.size
    return module(images)


def test_answers_are_those_of_the_module(student: comkd.LoadedStudent, photos: list[Path]) -> None:
    expected = by_hand(student, photos)
    features, logits = student.encode(photos), student.logits(photos)
    torch.testing.assert_close(features, expected.features)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(logits, student.model.logit_scale * features @ student.class_vectors.T)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(photos)))
    answers = student.predict(photos, top=3)
    exponentials = np.exp(expected.logits.double().numpy())
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    for answer, row in zip(answers, shares, strict=True):
        ranked = np.argsort(-row)[:3]
        assert [name for name, _ in answer.top] == [student.class_names[label] for label in ranked]
        assert (answer.label, answer.class_name) == (ranked[0], student.class_names[ranked[0]])
        assert [share for _, share in answer.top] == pytest.approx(row[ranked].tolist(), rel=1e-4)
        assert answer.probability == answer.top[0][1]


def test_one_image_of_any_kind(student: comkd.LoadedStudent, photos: list[Path]) -> None:
    path = photos[0]
    with Image.open(path) as image:
        pixels = np.asarray(image)
        kinds = [path, str(path), path.read_bytes(), image, pixels, [path], student.transform(path)[None]]
        found = [student.logits(kind) for kind in kinds]  # type: ignore[arg-type]
    for logits in found:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=0)
    assert found[0].shape == (1, len(student.class_names))
    grey = pixels[:, :, 0]
    torch.testing.assert_close(student.logits(grey), student.logits(np.stack([grey] * 3, axis=2)))


def test_no_images_give_no_answers(student: comkd.LoadedStudent) -> None:
    assert student.predict([]) == []
    assert student.encode([]).shape == (0, student.class_vectors.shape[1])


def test_images_that_cannot_be_used_are_named(student: comkd.LoadedStudent, photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        student.predict([photos[0], broken])
    assert caught.value.field == "images"
    assert str(broken) in caught.value.problem
    for wrong in (torch.zeros(3, 16, 16), torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(DataError) as caught:
            student.logits(wrong)
        assert caught.value.allowed == "float (images, 3, 16, 16)"
    with pytest.raises(DataError):
        student.predict(np.zeros((4, 4, 7)))
    with pytest.raises(MisuseError):
        student.predict(photos[0], top=0)


def test_answers_leave_the_mode_and_the_gradients_as_they_were(
    student: comkd.LoadedStudent, photos: list[Path]
) -> None:
    assert not student.model.training
    student.model.train()
    evaluated = student.encode(photos[:4])
    assert student.model.training
    student.model.eval()
    torch.testing.assert_close(student.encode(photos[:4]), evaluated)
    probe = nn.Linear(evaluated.shape[1], 2)
    probe(evaluated).sum().backward()  # features are plain tensors, which a probe can be trained on
    assert probe.weight.grad is not None


def test_the_transform_can_be_sent_to_another_process(student: comkd.LoadedStudent, photos: list[Path]) -> None:
    copy = pickle.loads(pickle.dumps(student.transform))
    torch.testing.assert_close(copy(photos[0]), student.transform(photos[0]), rtol=0, atol=0)


def test_a_class_is_added_and_saved(student: comkd.LoadedStudent, photos: list[Path], tmp_path: Path) -> None:
    before = student.logits(photos[:3])
    added = student.add_class("fox")
    assert student.class_names[-1] == "fox"
    cosines = student.class_vectors[:-1] @ student.class_vectors[-1]
    assert added == comkd.Added("fox", student.class_names[int(cosines.argmax())], pytest.approx(float(cosines.max())))
    torch.testing.assert_close(student.logits(photos[:3])[:, :-1], before)
    student.add_classes(["bee", "elk"], ["one {}"])
    path = student.save(tmp_path / "below" / "more.pt")
    again = comkd.load_student(path, device="cpu")
    assert again.class_names[-3:] == ("fox", "bee", "elk")
    assert again.record.metrics == student.record.metrics != {}  # no weight was trained
    assert again.record.identity == student.record.identity
    torch.testing.assert_close(again.logits(photos[:3]), student.logits(photos[:3]))
    again.add_class("owl")  # its teacher is found from the new place, too
    with pytest.raises(DataError):
        student.add_class("fox")


def test_a_fine_tuned_student_is_another_one(student: comkd.LoadedStudent, tmp_path: Path) -> None:
    for parameter in student.model.backbone.parameters():
        parameter.requires_grad_(False)  # a probe: what is frozen is saved too
    optimizer = torch.optim.SGD([p for p in student.model.parameters() if p.requires_grad], lr=0.1)
    student.model(torch.randn(4, 3, 16, 16)).logits.square().mean().backward()
    optimizer.step()
    path = student.save(tmp_path / "tuned.pt")
    again = comkd.load_student(path, device="cpu")
    for name, value in student.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=0)
    assert again.record.identity != student.record.identity
    assert (again.record.metrics, again.record.recipe_name) == ({}, f"{student.record.recipe_name}, fine-tuned")
    again.save(tmp_path / "twice.pt")
    assert comkd.load_student(tmp_path / "twice.pt").record.recipe_name == again.record.recipe_name
    with pytest.raises(MisuseError) as caught:
        again.save(path)
    assert caught.value.path == path
    again.save(path, force=True)


def test_a_trained_backbone_of_a_student_of_prompts_is_refused(tmp_path: Path, tiny_student: Path) -> None:
    _, old = load_student(tiny_student)
    whole = build_image_tower(old.recipe.student, seed=3)
    torch.save(whole.module.state_dict(), tmp_path / "tower.pt")
    prompts = {"train": "prompts", "config": tiny.TOWER, "weights": str(tmp_path / "tower.pt"), "prompts": {"depth": 1}}
    recipe = parse_recipe(tiny.recipe(student=prompts, loss={"refinement": {"weight": 1.0}, "edu_attention": None}))
    built = build_image_tower(recipe.student)
    vectors = nn.functional.normalize(torch.randn(len(old.class_names), 16), dim=-1)
    module = Student(built.module, built.width, vectors, torch.tensor(10.0), recipe.student, None)
    digest = state_sha256(built.module)
    save_student(
        tmp_path / "student.pt", module, replace(old, recipe=recipe, backbone=built.origin, backbone_sha256=digest)
    )
    student = comkd.load_student(tmp_path / "student.pt", device="cpu")
    assert not any("tower" in name for name in torch.load(student.save(tmp_path / "same.pt"))["state_dict"])
    with torch.no_grad():
        student.model.backbone.tower.conv1.weight.add_(1)  # type: ignore[operator, union-attr]
    with pytest.raises(CheckpointError) as caught:
        student.save(tmp_path / "other.pt")
    assert caught.value.path == tmp_path / "other.pt"
    assert not (tmp_path / "other.pt").exists()


def test_another_file_is_an_error_of_the_package(tmp_path: Path) -> None:
    torch.save(io.BytesIO(), tmp_path / "other.pt")
    with pytest.raises(comkd.ComkdError) as caught:
        comkd.load_student(tmp_path / "other.pt")
    assert caught.value.path == tmp_path / "other.pt"
