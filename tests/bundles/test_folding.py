import numpy as np
import pytest
import torch
from torch import nn

from comkd_cli.bundles.folding import Folding, folded, folding
from comkd_cli.events import Event, Notice
from comkd_cli.method.student import Student
from comkd_cli.models.costs import parameters
from comkd_cli.recipe import model as recipe
from tests import tiny

DIM = 8


class Backbone(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :DIM]


def make_student(gate: float | None, memory: str = "training") -> Student:
    torch.manual_seed(1)
    vectors = nn.functional.normalize(torch.randn(5, DIM), dim=1)
    attention = None if gate is None else recipe.EduAttention(gate_start=gate, memory=memory)  # type: ignore[arg-type]
    settings = recipe.Student(config=tiny.TOWER, train="full")
    return Student(Backbone(), DIM, vectors, torch.tensor(30.0), settings, attention).eval()


IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))


EVENTS: list[Event] = []


def decide(student: Student) -> Folding | None:
    with torch.no_grad():
        output = student(IMAGES)
    return folding(student, IMAGES.numpy(), output.features.numpy(), EVENTS.append)


@pytest.mark.parametrize(
    ("gate", "memory"),
    [(0.0, "training"), (1e-5, "training"), (-1e-5, "candidates"), (0.0, "candidates")],
)
def test_an_idle_gate_is_left_out(gate: float, memory: str) -> None:
    student = make_student(gate, memory)
    decision = decide(student)
    assert decision is not None
    assert decision.folded
    assert decision.gate == pytest.approx(gate)
    alone = folded(student, decision)
    with torch.no_grad():
        np.testing.assert_allclose(alone(IMAGES).features, student(IMAGES).features, atol=5e-5)
    assert (alone.uses_candidates, student.uses_candidates) == (False, memory == "candidates")
    # Three products of EduAttention with their biases, and its gate.
    assert parameters(student) - parameters(alone) == 3 * DIM * (DIM + 1) + 1
    assert isinstance(EVENTS[-1], Notice)
    assert "the graphs leave it out" in EVENTS[-1].text


def test_what_uniform_attention_adds_to_every_image_is_kept() -> None:
    student = make_student(-0.009)
    attention = student.edu_attention
    assert attention is not None
    with torch.no_grad():
        attention.query.weight.zero_()  # each class has the same weight for every image
        attention.query.bias.zero_()
        attention.value.bias.add_(3)
    student.add_classes(nn.functional.normalize(torch.ones(1, DIM), dim=1))  # not in the memory
    decision = decide(student)
    assert decision is not None
    assert decision.folded
    before = student.project(IMAGES).detach()
    with torch.no_grad():
        expected = student(IMAGES).features.numpy()
        found = folded(student, decision)(IMAGES).features.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(nn.functional.normalize(before, dim=1).numpy() - expected).max() > 1e-3
    np.testing.assert_array_equal(student.project(IMAGES).detach(), before)  # the student itself is unchanged


def test_a_small_gate_that_moves_the_features_stays() -> None:
    student = make_student(0.009)
    with torch.no_grad():
        assert student.edu_attention is not None
        student.edu_attention.value.weight.mul_(20)
        student.edu_attention.query.weight.mul_(50)  # attends to other classes for other images
    decision = decide(student)
    assert decision is not None
    assert not decision.folded
    assert folded(student, decision) is student
    with torch.no_grad():
        constant = student.edu_attention.gate * student.edu_attention.value(student.class_vectors).mean(0)
        without = nn.functional.normalize(student.project(IMAGES) + constant, dim=1)
        assert decision.difference_max == pytest.approx((without - student(IMAGES).features).abs().max().item())
    assert "too large to leave it out" in decision.words()


@pytest.mark.parametrize(("gate", "expected"), [(0.5, Folding(0.5, False)), (-0.5, Folding(-0.5, False)), (None, None)])
def test_a_gate_in_use_and_none_stay_as_they_are(gate: float | None, expected: Folding | None) -> None:
    student = make_student(gate)
    count = len(EVENTS)
    decision = decide(student)
    assert (decision, len(EVENTS)) == (expected, count)
    assert folded(student, decision) is student
