"""What a reader of the report should not overlook."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from comkd_cli.data.class_names import some
from comkd_cli.report.run import ScoredRun
from comkd_cli.report.statistics import share_interval
from comkd_cli.results.curve import IDLE_GATE

MOST_ANSWERS = 0.5  # one class that takes more of the answers than this, and twice its share, is reported
WIDE_POINTS = 5.0  # an interval wider than this does not tell good students apart


def findings(run: ScoredRun) -> list[str]:
    """A sentence for each thing that puts the figures in doubt or limits them."""
    found = [*_about_images(run), *_about_answers(run), *_about_training(run)]
    return list(dict.fromkeys([*found, *run.notices]))


def _about_images(run: ScoredRun) -> Iterator[str]:
    if not run.labelled and run.teacher is not None:
        yield "The images have no labels: every score below is agreement with the teacher, not accuracy."
    elif not run.labelled:
        yield "The images have no labels and the teacher was not found: there is nothing to compare the answers with."
    if run.learned_test_images:
        yield "The student was trained on the images that it is scored on, so the scores are optimistically biased."
    if run.facts.recipe.selection == "promptkd":
        yield "The epoch that was kept is the best on test images: the scores are optimistically biased."
    if run.unreadable:
        yield f"Images that could not be read and are not scored: {len(run.unreadable)}."
    if run.labelled:
        predicted, labels = run.against_reference(run.student)
        interval = share_interval(predicted == labels)
        if interval.high - interval.low > WIDE_POINTS:
            yield (
                f"{len(labels)} test images leave an interval of {interval.high - interval.low:.1f} points: "
                "more of them would narrow it."
            )
        present = set(labels.tolist())
        absent = [name for label, name in enumerate(run.class_names) if label not in present]
        if absent:
            yield f"No test images of {len(absent)} of {len(run.class_names)} classes: {some(absent)}."


def _about_answers(run: ScoredRun) -> Iterator[str]:
    predicted, reference = run.against_reference(run.student)
    if not len(predicted):
        return
    classes = len(run.class_names)
    answered = np.bincount(predicted, minlength=classes)
    expected = np.bincount(reference, minlength=classes)
    top = int(answered.argmax())
    share, own = answered[top] / len(predicted), expected[top] / len(reference)
    whose = "of the images" if run.labelled else "of the teacher's answers"
    if share > MOST_ANSWERS and share > 2 * own:
        yield (
            f"The student assigns {share:.0%} of the images to one class, {run.class_names[top]}, which has {own:.0%} "
            f"{whose}."
        )
    never = [name for label, name in enumerate(run.class_names) if expected[label] and not answered[label]]
    if never:
        yield f"The student never answers {len(never)} of {classes} classes: {some(never)}."
    if run.labelled and float(np.mean(predicted == reference)) <= expected.max() / len(reference):
        name = run.class_names[int(expected.argmax())]
        yield f"The student is no better than answering {name}, the most frequent class, for every image."


def _about_training(run: ScoredRun) -> Iterator[str]:
    if not run.distilled:
        yield "The student was trained on labels alone; the teacher gave it the class vectors and nothing else."
    gates = [epoch["gate"] for epoch in run.history if "gate" in epoch]
    if gates and abs(gates[-1]) < IDLE_GATE:
        yield f"EduAttention's gate ended at {gates[-1]:.4f}: it has almost no effect in this student."
