"""A dataset of the evaluation suite as a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from comkd_cli.data.class_names import check_class_count
from comkd_cli.data.contents import FileContents
from comkd_cli.data.folder import open_below
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.split_files import read_splits
from comkd_cli.data.splits import Entry
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report
from comkd_cli.recipe.catalog import Dataset


def catalogued_source(
    dataset: Dataset, data_root: Path, template: str | None = None, report: Report = lambda event: None
) -> Source:
    """The images of all classes: those of train for training, those of test for scoring.

    ImageNet's variants have only test images; a student is trained on those, without their labels, as PromptKD's
    are. Class names are those of the split file with spaces for underscores. Notices on the lists are reported. Raises
    DataError.
    """
    folder = data_root / dataset.folder
    if not folder.is_dir():
        raise DataError(
            f"{dataset.name} was not found",
            path=folder,
            remedy=f"run `comkd datasets check {dataset.name}`, which says how to get it, or set --data-root",
        )
    splits = read_splits(dataset, data_root)
    names = splits.class_names
    check_class_count(len(names), folder)
    for notice in splits.notices:
        report(Notice(notice))
    test = _image_set(folder, splits.test)
    unlabelled = replace(test, labels=None)
    return Source(
        name=dataset.name,
        class_names=tuple(names.values()),
        template=template or dataset.template,
        train=unlabelled if dataset.layout == "imagenet-variant" else _image_set(folder, splits.train),
        test=test,
        val=_image_set(folder, splits.val) if splits.val else None,
    )


def _image_set(folder: Path, entries: Sequence[Entry]) -> ImageSet:
    return ImageSet(
        keys=tuple(entry.path for entry in entries),
        labels=tuple(entry.label for entry in entries),
        open_key=partial(open_below, folder),
        contents=FileContents(folder),
    )
