"""`predict.py --self-test` and `--benchmark`: their options, and the printing of their figures."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from typing import Any

from comkd_cli.edge.benchmark import ROW_SECONDS, Benchmark, BenchmarkJob, run_benchmark
from comkd_cli.edge.folder_csv import INTERRUPTED
from comkd_cli.edge.self_test import SelfTest, run_self_test


def add_figure_options(parser: argparse.ArgumentParser) -> None:
    """Add --self-test, --benchmark and what belongs to them."""
    parser.add_argument(
        "--self-test", action="store_true", help="compare this machine's tensors and logits with the exporting one's"
    )
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help="time the bundle here; pre-processing on IMAGE, or on an image it makes",
    )
    parser.add_argument(
        "--seconds", type=float, default=ROW_SECONDS, help="with --benchmark: time of each row; default: %(default)s"
    )


def misused_figures(self_test: bool, benchmark: bool, images: int, others: bool) -> str | None:
    """Why these options, or the lack of an image, do not go together; None if they do.

    images: how many are given. others: whether there is an option that belongs to classifying.
    """
    if not (self_test or benchmark):
        return None if images else "give an IMAGE, --self-test or --benchmark"
    if self_test and benchmark:
        return "--self-test and --benchmark exclude each other"
    if others or images > benchmark:
        return "--self-test takes no IMAGE, --benchmark one at most, and neither takes --csv or --add-class"
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
        job = BenchmarkJob(options.bundle, options.precision, image, options.seconds)
        try:
            figures = run_benchmark(job, classifier)
        except KeyboardInterrupt:
            return INTERRUPTED
    print(json_text(figures.document(), sys.stdout.encoding) if options.json else figures.text())
    return 1 if isinstance(figures, SelfTest) and figures.differing else 0


def json_text(document: object, encoding: str | None) -> str:
    """A JSON document for a stream with this encoding: UTF-8 text where the stream is UTF-8, else ASCII with escapes.

    JSON is UTF-8 by its standard (RFC 8259, section 8.1). File names that are not valid Unicode are escaped, too.
    """
    text = json.dumps(document, ensure_ascii=False, indent=2)
    try:
        text.encode("utf-8")
        is_utf8 = codecs.lookup(encoding or "ascii").name == "utf-8"
    except (UnicodeEncodeError, LookupError):
        is_utf8 = False
    return text if is_utf8 else json.dumps(document, indent=2)
