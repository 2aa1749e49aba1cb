"""Whether a dataset has the classes that a student was trained on; with others, its predictions mean other classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comkd_cli.data.class_names import class_key, some
from comkd_cli.data.source import Source
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report, ignore_event

if TYPE_CHECKING:
    from comkd_cli.models.checkpoints import StudentRecord


def check_classes(record: StudentRecord, source: Source, report: Report = ignore_event) -> None:
    """Raise DataError, naming the differences, unless the dataset has the student's classes in the same order.

    Spellings of one name count as equal: students of older versions keep the underscores of their class lists. The
    classes that were added to a student may be missing from the data, all of them: a notice names them, and labels mean
    the same classes.
    """
    trained = [str(name) for name in record.class_names]
    trained_keys, data_keys = [class_key(name) for name in trained], [class_key(name) for name in source.class_names]
    if trained_keys == data_keys:
        return
    if record.classes_added and data_keys == [class_key(name) for name in record.trained_classes]:
        report(Notice(f"{source.name}: has no images of the classes that were added: {some(record.classes_added)}"))
        return
    added = [name for name, key in zip(source.class_names, data_keys, strict=True) if key not in trained_keys]
    missing = [name for name, key in zip(trained, trained_keys, strict=True) if key not in data_keys]
    faults = []
    if added:
        faults.append(f"the student does not know {some(added)}")
    if missing:
        faults.append(f"the data lacks {some(missing)}")
    if not faults:
        faults = ["their number differs"]
        for label, (name, other) in enumerate(zip(trained, source.class_names, strict=False)):
            if trained_keys[label] != data_keys[label]:
                faults = [f"their order differs: class {label + 1} is {name} for the student, and {other} in the data"]
                break
    raise DataError(
        f"{source.name}: its classes do not match the student's {len(trained)} classes: {'; '.join(faults)}",
        remedy="use data with the student's classes, in the same order (for a folder: use a class list, one name per "
        "line)",
    )
