import json
from pathlib import Path
from typing import Any

import pytest

from comkd_cli.results.curve import judge, read_curve, score_name


def history(
    scores: list[float | None], losses: list[float] | None = None, images: int = 10_000
) -> list[dict[str, Any]]:
    """The lines of a curve; an epoch whose score is None was not scored."""
    lines = []
    for number, (score, loss) in enumerate(zip(scores, losses or [1.0] * len(scores), strict=True), 1):
        scored = {} if score is None else {"test_top1_percent": score, "test_images": images}
        lines.append({"epoch": number, "loss": loss, **scored})
    return lines


RISING = [50.0, 60, 65, 70, 74, 78, 80, 82, 84, 86]
LEVEL = [50.0, 60, 65, 70, 74, 78, 80, 80, 80.1, 80.0]


@pytest.mark.parametrize(
    ("scores", "losses", "trend", "advice"),
    [
        (RISING, None, "rising", "more epochs"),
        (LEVEL, [2.0, 1.5, 1.2, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], "level", "more images"),
        (LEVEL, [2.0, 1.5, 1.2, 1, 0.9, 0.8, 0.7, 0.6, 0.6, 0.595], "level", "larger student"),
        ([50.0, 60, 65, 70, 74, 78, 80, 80, 74, 72], None, "falling", "more images"),
        ([50.0, 60, 65, 70, 74, 78, 80, 97, 99.9, 100], None, "level", "little left to gain"),
    ],
)
def test_the_last_fifth_is_judged_by_the_best_score_before_it(
    scores: list[float | None], losses: list[float] | None, trend: str, advice: str
) -> None:
    verdict = judge(history(scores, losses))
    assert verdict.trend == trend
    assert advice in verdict.sentence
    assert "last 2 of 10 epochs" in verdict.sentence


def test_the_figures_of_the_sentence_are_the_curves_own() -> None:
    assert "from 82.00 to 86.00 %, standard error 0.35 points" in judge(history(RISING)).sentence  # sqrt(.86*.14/1e4)


def test_a_gain_within_the_standard_error_of_few_images_is_no_rise() -> None:
    scores: list[float | None] = [50.0, 60, 65, 70, 74, 78, 79, 80, 81, 82]
    assert judge(history(scores, images=10_000)).trend == "rising"
    assert judge(history(scores, images=100)).trend == "level"


@pytest.mark.parametrize("scores", [[50.0], [50.0, 60, 70, 80], [None] * 9 + [80.0], [50.0, *([None] * 9)]])
def test_too_few_scored_epochs_tell_nothing(scores: list[float | None]) -> None:
    verdict = judge(history(scores))
    assert verdict.trend == "unknown"
    assert "evaluate_every_epochs" in verdict.sentence


def test_epochs_between_scores_do_not_count_as_scores() -> None:
    sparse: list[float | None] = [None, 50.0, None, 60.0, None, 70.0, None, 80.0, None, 90.0]
    assert judge(history(sparse)).trend == "rising"


def test_a_score_of_null_is_none() -> None:
    sparse = history([None, 50.0, None, 60.0, None, 70.0, None, 80.0, None, 90.0])
    assert judge([{"test_top1_percent": None, **epoch} for epoch in sparse]) == judge(sparse)
    unscored = history([None] * 5)
    assert judge([{"test_top1_percent": None, **epoch} for epoch in unscored]) == judge(unscored)


def test_a_count_of_images_below_zero_says_nothing_of_the_standard_error() -> None:
    assert "standard error 0.50 points" in judge(history(LEVEL, images=-5)).sentence


def test_without_scores_the_loss_is_all_that_is_said() -> None:
    verdict = judge(history([None] * 5, [1.0, 0.9, 0.8, 0.5, 0.4]))
    assert verdict.trend == "unknown"
    assert "still fell by 20%" in verdict.sentence
    assert judge(history([None])).trend == "unknown"


def test_agreement_is_judged_where_there_is_no_accuracy() -> None:
    lines = [{"epoch": i, "loss": 1.0, "test_agreement_percent": 50.0 + i} for i in range(1, 11)]
    assert score_name(lines) == "test_agreement_percent"
    verdict = judge(lines)
    assert verdict.trend == "rising"
    assert "agreement with the teacher" in verdict.sentence


def test_a_curve_is_read_back_and_what_is_none_is_empty(tmp_path: Path) -> None:
    lines = history(LEVEL)
    assert read_curve(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(tmp_path) == lines
    unscored = '{"epoch": 1, "test_top1_percent": null}'
    (tmp_path / "metrics.jsonl").write_text(unscored)
    assert read_curve(tmp_path) == [json.loads(unscored)]
    other = (
        '{"epoch": "x"}',
        '{"epoch": 1, "loss": []}',
        '{"epoch": 1, "test_top1_percent": 101}',
        f'{{"epoch": {10**400}}}',
    )
    for damaged in ('{"epoch": 1', "[1]\n", '{"loss": 1}\n', "[" * 5000, *other):
        (tmp_path / "metrics.jsonl").write_text(damaged)
        assert read_curve(tmp_path) == []
