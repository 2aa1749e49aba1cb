"""`predict.py --self-test` and `--benchmark`: their options, and the printing of their figures."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Sequence
from typing import Any

from comkd_cli.edge.benchmark import ROW_SECONDS, Benchmark, BenchmarkJob, run_benchmark
from comkd_cli.edge.folder_csv import INTERRUPTED
from comkd_cli.edge.self_test import SelfTest, run_self_test


def add_figure_options(parser: argparse.ArgumentParser) -> None:
    """Add --self-test, --benchmark and their options."""
    parser.add_argument(
        "--self-test", action="store_true", help="compare this machine's tensors and logits with the exporting one's"
    )
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help="time the bundle here; pre-processing on IMAGE, or on an image it makes",
    )
    parser.add_argument(
        "--seconds", type=float, help=f"with --benchmark: time of each row, at least 0; default: {ROW_SECONDS}"
    )


def classifying_options(options: argparse.Namespace) -> list[str]:
    """The classification options of predict.py that are given. options.top: None if it is not given."""
    given = {
        "--csv": options.csv,
        "--add-class": options.add_class,
        "--no-threshold": options.no_threshold,
        "--top": options.top is not None,
    }
    return [name for name, value in given.items() if value]


def misused_figures(
    self_test: bool, benchmark: bool, images: Sequence[str], others: Sequence[str], seconds: float | None
) -> str | None:
    """Why these options cannot be combined, or why an image is missing; None if nothing is wrong.

    images: those given. others: the classification options that are given. seconds: None if the option is not given.
    """
    if self_test and benchmark:
        return "--self-test and --benchmark cannot be combined"
    if seconds is not None and not benchmark:
        return "--seconds requires --benchmark"
    if not (self_test or benchmark):
        return None if images else "specify an IMAGE, --self-test or --benchmark"
    if others or len(images) > benchmark:
        extra = "--self-test accepts no IMAGE, --benchmark at most one, and neither accepts classification options"
        return f"{extra}: {', '.join(others)}" if others else extra
    if "-" in images:
        return "--benchmark reads an image file, not standard input"
    if seconds is not None and not seconds >= 0:  # NaN compares as false
        return "--seconds must be at least 0"
    return None


def figures_command(options: argparse.Namespace, classifier: Any) -> int:
    """Check or time the bundle on this machine, and print the figures; returns the exit status of predict.py.

    classifier: edge.classifier.Classifier, which imports this module. Raises BundleProblem, UnreadableImage.
    """
    figures: SelfTest | Benchmark
    if options.self_test:
        figures = run_self_test(options.bundle, options.precision, classifier)
    else:
        image = options.images[0] if options.images else None
        seconds = ROW_SECONDS if options.seconds is None else options.seconds
        job = BenchmarkJob(options.bundle, options.precision, image, seconds)
        try:
            figures = run_benchmark(job, classifier)
        except KeyboardInterrupt:
            return INTERRUPTED
    print(json_text(figures.document(), sys.stdout.encoding) if options.json else figures.text())
    return 1 if isinstance(figures, SelfTest) and figures.differing else 0


def json_text(document: object, encoding: str | None) -> str:
    """A JSON document for a stream with this encoding: UTF-8 text if the stream is UTF-8, else ASCII with escapes.

    JSON is UTF-8 by its standard (RFC 8259, section 8.1). File names that are not valid Unicode are also escaped.
    """
    text = json.dumps(document, ensure_ascii=False, indent=2)
    try:
        text.encode("utf-8")
        is_utf8 = codecs.lookup(encoding or "ascii").name == "utf-8"
    except (UnicodeEncodeError, LookupError):
        is_utf8 = False
    return text if is_utf8 else json.dumps(document, indent=2)
