from dataclasses import replace

import pytest

from comkd_cli.data.digits import digits_source
from comkd_cli.data.holdout import Holdout
from comkd_cli.evaluation import scoring
from comkd_cli.evaluation.scoring import Scores, agreement_of, images_to_score
from comkd_cli.events import Event, Notice

DIGITS = digits_source()


def notices(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


def test_agreement_counts_only_images_that_both_models_answered() -> None:
    first, second = Scores([], {0: 1, 1: 2, 2: 3}), Scores([], {1: 2, 2: 0, 5: 1})
    assert agreement_of(first, second).percent == agreement_of(second, first).percent == pytest.approx(50.0)


def test_the_most_frequent_answer_is_the_teachers_on_those_images() -> None:
    student = Scores([], dict.fromkeys(range(10), 0))
    teacher = Scores([], {**dict.fromkeys(range(9), 2), 9: 0, 11: 0, 12: 0})
    agreement = agreement_of(student, teacher)
    assert (agreement.percent, agreement.top_answer, agreement.top_answer_percent) == (10.0, 2, 90.0)


def test_held_out_images_are_scored_and_of_very_many_without_labels_some(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    held = replace(DIGITS, holdout=Holdout(20.0))
    assert images_to_score(held, events.append) is DIGITS.test
    assert DIGITS.test is not None
    monkeypatch.setattr(scoring, "MOST_FOR_AGREEMENT", 100)
    unlabelled = replace(held, test=replace(DIGITS.test, labels=None))
    assert len(images_to_score(unlabelled, events.append)) == 120  # every third of 360
    assert "held-out images of digits have no labels" in notices(events)


def test_test_images_are_scored_and_missing_labels_reported() -> None:
    assert DIGITS.test is not None
    events: list[Event] = []
    assert images_to_score(DIGITS, events.append) is DIGITS.test
    assert not events
    unlabelled = replace(DIGITS, test=replace(DIGITS.test, labels=None))
    assert images_to_score(unlabelled, events.append).labels is None
    assert "only agreement" in notices(events)


def test_without_test_images_training_images_are_compared_without_their_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Event] = []
    source = replace(DIGITS, test=None)
    images = images_to_score(source, events.append)
    assert (images.labels, len(images)) == (None, len(DIGITS.train))
    monkeypatch.setattr(scoring, "MOST_FOR_AGREEMENT", 100)
    fewer = images_to_score(source, events.append)
    assert fewer.labels is None
    assert 100 <= len(fewer) < 200
    assert set(fewer.keys) < set(DIGITS.train.keys)
    assert f"{len(fewer)} of {len(DIGITS.train):,} images" in notices(events)
