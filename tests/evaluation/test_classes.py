import re
from types import SimpleNamespace
from typing import cast

import pytest

from comkd_cli.data.source import ImageSet, Source
from comkd_cli.errors import DataError
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.events import Event, Notice
from comkd_cli.models.checkpoints import StudentRecord


def check(known: tuple[str, ...], found: tuple[str, ...]) -> None:
    record = cast(StudentRecord, SimpleNamespace(class_names=known, classes_added=(), trained_classes=known))
    check_classes(record, Source("pets", found, "{}", cast(ImageSet, None), None))


def check_added(trained: tuple[str, ...], added: tuple[str, ...], found: tuple[str, ...]) -> list[Event]:
    fields = {"class_names": trained + added, "classes_added": added, "trained_classes": trained}
    events: list[Event] = []
    source = Source("pets", found, "{}", cast(ImageSet, None), None)
    check_classes(cast(StudentRecord, SimpleNamespace(**fields)), source, events.append)
    return events


def test_data_may_lack_all_classes_that_were_added_and_a_notice_names_them() -> None:
    assert check_added(("cat", "dog"), ("fox", "owl"), ("cat", "dog", "fox", "owl")) == []
    (notice,) = check_added(("cat", "dog"), ("fox", "owl"), ("cat", "dog"))
    assert isinstance(notice, Notice)
    assert "fox, owl" in notice.text


@pytest.mark.parametrize(
    "found", [("cat", "dog", "fox"), ("cat", "dog", "owl", "fox"), ("dog", "cat"), ("cat", "fox", "owl")]
)
def test_data_with_other_classes_than_an_extended_students_is_refused(found: tuple[str, ...]) -> None:
    with pytest.raises(DataError):
        check_added(("cat", "dog"), ("fox", "owl"), found)


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
        (("bee", "cat", "dog", "fox"), "the student's 3 classes: the student does not know bee$"),
        (("cat", "dog"), ": the data lacks fox$"),
        (("cat", "dog", "owl"), "the student does not know owl; the data lacks fox$"),
        (("cat", "fox", "dog"), "their order differs: class 2 is dog for the student, and fox in the data$"),
        (("cat", "dog", "fox", "fox"), "their number differs"),
    ],
)
def test_classes_that_differ_are_named(found: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check(("cat", "dog", "fox"), found)
    assert caught.value.problem.startswith("pets: its classes do not match the student's 3 classes: ")
    assert re.search(message, caught.value.problem)
    assert "class list" in str(caught.value.remedy)
