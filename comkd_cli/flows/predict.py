"""Classify images with a bundle. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comkd_cli.bundles.problems import bundle_errors
from comkd_cli.edge.benchmark import Benchmark, BenchmarkJob, run_benchmark
from comkd_cli.edge.classifier import ADDED_NOTE, Classifier, predict_all
from comkd_cli.edge.folder_csv import CsvJob, CsvProblem, CsvSummary, bundle_settings, write_folder_csv
from comkd_cli.edge.image_files import skipped_text
from comkd_cli.edge.images import UnreadableImage
from comkd_cli.edge.self_test import SelfTest, run_self_test
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Progress, Report, ignore_event


@dataclass(frozen=True)
class Table:
    """A CSV file with a row for each image of a folder."""

    folder: Path
    path: Path
    fresh: bool = False
    """Replace what an earlier run wrote, instead of resuming it."""
    threshold: bool = True
    """Apply the bundle's threshold, if it has one, in the column `none_of_these`."""


def predict(
    bundle: Path,
    images: Sequence[str],
    top: int,
    precision: str | None = None,
    add_classes: Sequence[str] = (),
    threshold: bool = True,
) -> list[dict[str, Any]]:
    """A plain record for each image: its `top` most probable classes, or the error if it could not be read.

    images: paths; `-` is standard input. precision: None uses the first of the bundle. add_classes: names of classes
    beside the bundle's own. threshold: apply the bundle's. Raises BundleError.
    """
    with bundle_errors():
        return predict_all(_classifier(bundle, precision, add_classes, threshold), images, top)


def predict_folder(
    bundle: Path,
    table: Table,
    top: int,
    precision: str | None = None,
    add_classes: Sequence[str] = (),
    report: Report = ignore_event,
) -> CsvSummary:
    """Write the table of a folder, resuming an interrupted one; see edge/folder_csv.py.

    Other arguments as in `predict`. Raises BundleError; DataError for a folder without images, and for a table that
    was written from other images or settings; OSError if the system refuses to write.
    """
    try:
        with bundle_errors():
            classifier = _classifier(bundle, precision, add_classes, table.threshold)
            made_by = bundle_settings(bundle, precision, add_classes, table.threshold)
            job = CsvJob(table.folder, table.path, top, made_by, table.fresh)
            summary = write_folder_csv(
                classifier, job, lambda done, total: report(Progress("classifying images", done, total))
            )
    except CsvProblem as error:
        raise DataError(error.problem, path=error.path, found=error.found, remedy=error.remedy) from error
    if add_classes and classifier.confidence.threshold is not None and table.threshold:
        report(Notice(ADDED_NOTE))
    if skipped := skipped_text(summary.skipped):
        report(Notice(f"{table.folder}: {skipped}"))
    return summary


def self_test(bundle: Path, precision: str | None = None) -> SelfTest:
    """Compare this machine's tensors and logits with a bundle's reference/.

    precision: None checks each of the bundle. Raises BundleError, as for a bundle of an older version.
    """
    with bundle_errors():
        return run_self_test(bundle, precision, Classifier)


def benchmark(job: BenchmarkJob, report: Report = ignore_event) -> Benchmark:
    """Time a bundle on this machine. Raises BundleError, and DataError for an image that cannot be read."""
    try:
        with bundle_errors():
            return run_benchmark(
                job, Classifier, lambda done, total: report(Progress("timing the bundle", done, total))
            )
    except UnreadableImage as error:
        raise DataError(str(error)) from error


def _classifier(bundle: Path, precision: str | None, add_classes: Sequence[str], threshold: bool) -> Classifier:
    classifier = Classifier(bundle, precision=precision, threshold=threshold)
    if add_classes:
        classifier.add_classes(add_classes)
    return classifier
