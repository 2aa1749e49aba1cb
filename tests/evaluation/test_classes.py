import re
from types import SimpleNamespace
from typing import cast

import pytest

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.errors import DataError
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.models.checkpoints import StudentRecord


def check(known: tuple[str, ...], found: tuple[str, ...]) -> None:
    record = cast(StudentRecord, SimpleNamespace(class_names=known))
    check_classes(record, Source("pets", found, "{}", cast(ImageSet, None), None))


@pytest.mark.parametrize(
    "known",
    [
        ("cat", "red panda"),
        ("cat", "red_panda"),  # as versions stored a class list that wrote it so
        ("cat\n", "Red  panda"),
    ],
)
def test_spellings_of_the_same_classes_in_the_same_order_pass(known: tuple[str, ...]) -> None:
    check(known, ("cat", "red panda"))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (("bee", "cat", "dog", "fox"), "trained on 3 classes, and it does not know bee$"),
        (("cat", "dog"), "and the data lacks fox$"),
        (("cat", "dog", "owl"), "it does not know owl; the data lacks fox$"),
        (("cat", "fox", "dog"), "their order differs: class 2 is dog for the student, and fox in the data$"),
        (("cat", "dog", "fox", "fox"), "their number differs"),
    ],
)
def test_classes_that_differ_are_named(found: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check(("cat", "dog", "fox"), found)
    assert caught.value.problem.startswith("pets: the student was trained on 3 classes, and ")
    assert re.search(message, caught.value.problem)
    assert "class list" in str(caught.value.remedy)
