"""`student.shots`: the student is trained on a draw of each class, and its teacher on what it was trained on before."""

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comkd_cli.api.runs import Place
from comkd_cli.data.digits import digits_source
from comkd_cli.errors import DataError
from comkd_cli.flows import distill
from comkd_cli.recipe import Recipe, parse_recipe
from comkd_cli.recipe.catalog import CATALOG
from tests import tiny
from tests.flows.test_suite import PER_CLASS, fill


def recipe(shots: int | None, seed: int = 1, **changes: Any) -> Recipe:
    fields = tiny.recipe(**changes)
    return parse_recipe({**fields, "seed": seed, "student": {**fields["student"], "shots": shots}})


def drawn_by_hand(labels: tuple[int, ...], shots: int, seed: int) -> list[int]:
    """Dassl's draw: one stream of random numbers, the classes in the order in which they appear."""
    stream, groups = random.Random(seed), defaultdict(list)
    for position, label in enumerate(labels):
        groups[label].append(position)
    return [position for group in groups.values() for position in stream.sample(group, shots)]


@pytest.mark.parametrize("seed", [1, 2])
def test_the_draw_is_that_of_dassl_with_the_recipes_seed(seed: int) -> None:
    source = digits_source()
    drawn = distill.training_source(recipe(3, seed), source)
    labels = source.train.labels or ()
    expected = drawn_by_hand(labels, 3, seed)
    assert drawn.train.keys == tuple(source.train.keys[position] for position in expected)
    assert drawn.train.labels == tuple(labels[position] for position in expected)
    assert (drawn.test, drawn.class_names) == (source.test, source.class_names)


def test_without_shots_every_image_is_trained_on() -> None:
    source = digits_source()
    assert distill.training_source(recipe(None), source) is source


def test_images_without_a_label_are_not_drawn_and_labels_are_needed() -> None:
    source = digits_source()
    labels = tuple(-1 if position % 2 else label for position, label in enumerate(source.train.labels or ()))
    partly = replace(source, train=replace(source.train, labels=labels))
    drawn = distill.training_source(recipe(2), partly)
    assert len(drawn.train) == 20
    assert -1 not in (drawn.train.labels or ())
    unlabelled = replace(source, train=replace(source.train, labels=None))
    with pytest.raises(DataError) as caught:
        distill.training_source(recipe(2), unlabelled)
    assert caught.value.field == "student.shots"


def test_the_teacher_draws_from_all_images_and_the_student_from_all_too(tmp_path: Path) -> None:
    fill(CATALOG["dtd"], tmp_path)
    adapt = {"method": "promptsrc", "vision_depth": 1, "text_depth": 1, "shots": 2}
    weights = tmp_path / "weights.pt"
    weights.touch()
    teacher = {"config": tiny.CLIP, "weights": str(weights), "adapt": adapt}
    place = Place("few", tmp_path / "runs", tmp_path)
    made = [
        place.prepare(recipe(shots, data={"dataset": "dtd"}, teacher=teacher), lambda event: None)
        for shots in (1, None)
    ]
    (few, few_stage), (every, stage) = made
    assert len(few.source.train) == 4
    assert len(every.source.train) == 4 * PER_CLASS
    assert few_stage.key == stage.key
    assert few.identity.digest != every.identity.digest
