"""Findings on teachers whose answers are known by construction."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from comkd_cli.teachers.inspection import Finding, Inspection, inspect

CLASSES, DIM = 4, 16
NAMES = ("cat", "dog", "fox", "owl")
VECTORS = torch.eye(CLASSES, DIM)


def answering(*counts: int) -> Tensor:
    """Features of so many images of each class: its vector, and noise."""
    rows = [functional.one_hot(torch.tensor(label), DIM).float() for label, n in enumerate(counts) for _ in range(n)]
    noise = torch.randn(len(rows), DIM, generator=torch.Generator().manual_seed(1))
    return functional.normalize(torch.stack(rows) + 0.1 * noise, dim=1)


def kinds(inspection: Inspection) -> list[str]:
    return [finding.kind for finding in inspection.findings]


def finding_of(inspection: Inspection, kind: str) -> Finding:
    (found,) = [finding for finding in inspection.findings if finding.kind == kind]
    return found


def test_a_sound_teacher_has_no_finding() -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    found = inspect(answering(10, 10, 10, 10), VECTORS, 100.0, NAMES, labels)
    assert (kinds(found), found.images, found.accuracy_percent) == ([], 40, 100.0)
    assert found.share_percent == (25.0, 25.0, 25.0, 25.0)
    assert found.confidence_percent > 99


def test_one_class_for_nearly_everything_is_found_unless_the_labels_explain_it() -> None:
    features = answering(38, 1, 1, 0)
    unlabelled = finding_of(inspect(features, VECTORS, 100.0, NAMES, None), "one_class")
    assert (unlabelled.figures, unlabelled.names) == ({"share_percent": 95.0}, ("cat",))
    even = inspect(features, VECTORS, 100.0, NAMES, [0, 1, 2, 3] * 10)
    assert finding_of(even, "one_class").figures == {"share_percent": 95.0, "label_share_percent": 25.0}
    assert even.accuracy_percent is not None
    assert "never_answered" not in kinds(even)  # it follows from the first
    explained = inspect(features, VECTORS, 100.0, NAMES, [0] * 38 + [1, 2])
    assert kinds(explained) == []


def test_a_few_labels_give_an_accuracy_and_explain_nothing() -> None:
    labels = [0] * 10 + [-1] * 28 + [1, 0]
    found = inspect(answering(38, 1, 1, 0), VECTORS, 100.0, NAMES, labels)
    assert (found.images, found.labelled, found.accuracy_percent) == (40, 12, pytest.approx(100 * 11 / 12))
    assert "accuracy 91.7 % on the 12 labelled ones" in found.line
    assert finding_of(found, "one_class").figures == {"share_percent": 95.0}
    assert Inspection.from_plain(json.loads(json.dumps(found.as_plain()))) == found


def test_two_classes_may_be_as_uneven_as_they_are() -> None:
    assert kinds(inspect(answering(39, 1, 0, 0), VECTORS[:2], 100.0, NAMES[:2], None)) == []


@pytest.mark.parametrize(("images", "found"), [(6, False), (7, True)])
def test_a_class_without_an_answer_is_found_where_five_were_expected(images: int, found: bool) -> None:
    # 3 * 6 = 18 images: 4.5 of each of four classes are expected; 3 * 7 = 21: 5.25.
    inspection = inspect(answering(images, images, images, 0), VECTORS, 100.0, NAMES, None)
    assert ("never_answered" in kinds(inspection)) is found
    if found:
        assert finding_of(inspection, "never_answered").names == ("owl",)


def test_with_labels_a_class_is_expected_as_often_as_it_is_labelled() -> None:
    features, labels = answering(14, 14, 12, 0), [0] * 14 + [1] * 14 + [2] * 8 + [3] * 4
    assert "never_answered" not in kinds(inspect(features, VECTORS, 100.0, NAMES, labels))
    labels[-5] = 3
    assert "never_answered" in kinds(inspect(features, VECTORS, 100.0, NAMES, labels))


def test_confidence_near_chance_depends_on_the_temperature() -> None:
    features = answering(10, 10, 10, 10)
    cold = inspect(features, VECTORS, 0.1, NAMES, None)
    figures = finding_of(cold, "near_chance").figures
    assert figures["chance_percent"] == 25.0
    assert figures["confidence_percent"] == pytest.approx(cold.confidence_percent)
    assert "near_chance" not in kinds(inspect(features, VECTORS, 100.0, NAMES, None))


def test_class_vectors_that_are_nearly_equal_are_named_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = VECTORS.clone()
    vectors[3] = functional.normalize(VECTORS[1] + 0.1 * VECTORS[3], dim=0)  # cosine 1 / sqrt(1.01) = 0.995
    features = answering(10, 10, 10, 10)
    found = finding_of(inspect(features, vectors, 100.0, NAMES, None), "similar_classes")
    assert (found.names, found.figures["pairs"]) == (("dog / owl",), 1)
    assert found.figures["cosine_max"] == pytest.approx(1.01**-0.5, abs=1e-5)
    monkeypatch.setattr("comkd_cli.teachers.inspection.CLASSES_AT_ONCE", 3)  # in blocks, with the same result
    assert finding_of(inspect(features, vectors, 100.0, NAMES, None), "similar_classes") == found


def test_of_many_equal_classes_five_pairs_are_named_and_all_are_counted() -> None:
    names = tuple(f"class {number}" for number in range(6))
    vectors = functional.normalize(torch.ones(6, DIM), dim=1)
    found = finding_of(inspect(answering(1, 1, 1, 1), vectors, 100.0, names, None), "similar_classes")
    assert (len(found.names), found.figures["pairs"]) == (5, 15)


def test_near_duplicates_are_counted_where_other_images_differ() -> None:
    features = answering(10, 10, 10, 10)
    features[1] = functional.normalize(features[0] + 1e-3 * features[20], dim=0)
    found = finding_of(inspect(features, VECTORS, 100.0, NAMES, None), "near_duplicates")
    assert found.figures == {"images": 2, "sample": 40}
    collapsed = features[:1].repeat(40, 1)
    assert "near_duplicates" not in kinds(inspect(collapsed, VECTORS, 100.0, NAMES, None))


def test_an_inspection_survives_its_file() -> None:
    found = inspect(answering(38, 1, 1, 0), VECTORS, 100.0, NAMES, None)
    assert found.findings
    assert Inspection.from_plain(json.loads(json.dumps(found.as_plain()))) == found


def test_without_images_there_is_nothing_to_inspect() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        inspect(torch.empty(0, DIM), VECTORS, 100.0, NAMES, None)
