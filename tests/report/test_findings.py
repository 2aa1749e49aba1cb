from pathlib import Path

import pytest

from comkd_cli.report.findings import findings
from tests.report.scored import scored_run

LABELS = [0, 0, 1, 1, 2, 2] * 40
GOOD = [0, 0, 1, 1, 2, 2] * 39 + [0, 0, 1, 1, 2, 1]


def said(found: list[str], words: str) -> bool:
    return any(words in sentence for sentence in found)


def test_a_sound_run_has_no_findings(tmp_path: Path) -> None:
    assert findings(scored_run(tmp_path, GOOD, GOOD, LABELS)) == []


@pytest.mark.parametrize(
    ("student", "labels", "words"),
    [
        ([1] * 240, LABELS, "assigns 100% of the images to one class, bee, which has 33%"),
        ([0, 0, 1, 1, 0, 1] * 40, LABELS, "never answers 1 of 3 classes: cat"),
        ([0] * 240, LABELS, "no better than answering ant"),
        ([0, 1, 1, 1] * 60, [0, 1, 0, 1] * 60, "No test images of 1 of 3 classes: cat"),
        ([0, 1, 2], [0, 1, 1], "3 test images leave an interval"),
    ],
)
def test_what_is_wrong_with_the_answers_is_said(
    tmp_path: Path, student: list[int], labels: list[int], words: str
) -> None:
    assert said(findings(scored_run(tmp_path, student, student, labels)), words)


def test_a_class_that_most_images_have_may_take_most_answers(tmp_path: Path) -> None:
    labels = [0] * 200 + [1] * 20 + [2] * 20
    assert not said(findings(scored_run(tmp_path, labels, labels, labels)), "to one class")


def test_scores_on_images_that_were_learned_from_are_biased(tmp_path: Path) -> None:
    assert said(findings(scored_run(tmp_path, GOOD, GOOD, LABELS, learned_test_images=True)), "optimistically biased")
    selected = scored_run(tmp_path, GOOD, GOOD, LABELS, recipe={"selection": "promptkd"})
    assert said(findings(selected), "best on test images")


def test_without_labels_scores_are_agreement(tmp_path: Path) -> None:
    assert said(findings(scored_run(tmp_path, GOOD, LABELS)), "agreement with the teacher, not accuracy")
    assert said(findings(scored_run(tmp_path, GOOD)), "nothing to compare")


def test_what_was_reported_while_scoring_is_said_once(tmp_path: Path) -> None:
    run = scored_run(tmp_path, GOOD, GOOD, LABELS, notices=("a note", "a note"), unreadable=("x.png: cut off",))
    found = findings(run)
    assert found.count("a note") == 1
    assert said(found, "could not be read and are not scored: 1.")


def test_a_student_without_a_teacher_and_an_idle_gate_are_said(tmp_path: Path) -> None:
    alone = {"loss": {"refinement": None, "if_align": None, "edu_attention": None, "labels": {"weight": 1.0}}}
    assert said(findings(scored_run(tmp_path, GOOD, GOOD, LABELS, recipe=alone)), "labels alone")
    idle, moved = ([{"epoch": 1, "loss": 1.0, "gate": gate}] for gate in (0.004, -0.4))
    assert said(findings(scored_run(tmp_path, GOOD, GOOD, LABELS, history=idle)), "gate ended at 0.0040")
    assert not said(findings(scored_run(tmp_path, GOOD, GOOD, LABELS, history=moved)), "gate")
