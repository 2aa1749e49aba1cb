"""`comkd predict`: classify images with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from comkd_cli.cli.options import json_option

if TYPE_CHECKING:
    from comkd_cli.flows.predict import Table


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Classify all images in the folder IMAGE and its subfolders, and write this CSV file; a rerun resumes it.",
)
@click.option("--fresh", is_flag=True, help="Replace the CSV file instead of resuming it.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to print per image.")
@click.option("--precision", help="fp32, fp16 or int8. Default: the first that BUNDLE has.")
@click.option(
    "--add-class",
    "add_classes",
    metavar="NAME",
    multiple=True,
    help="Add this class to those of BUNDLE; may be repeated.",
)
@click.option("--no-threshold", is_flag=True, help="Never answer 'none of these', whatever the probability.")
@click.option(
    "--self-test",
    is_flag=True,
    help="Compare this machine's tensors and logits with those of BUNDLE's reference/; exit code 1 if they differ.",
)
@click.option(
    "--benchmark",
    is_flag=True,
    help="Time the pre-processing of IMAGE (default: a generated image) and each precision on this machine.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Seconds per row of --benchmark.",
)
@json_option
def command(
    bundle: Path, images: tuple[str, ...], csv_file: Path | None, fresh: bool, as_json: bool, **settings: Any
) -> None:
    """Classify each IMAGE with the exported BUNDLE.

    It prints the most probable classes, and needs no torch. BUNDLE is a folder, or hf:OWNER/NAME for one on the Hugging
    Face Hub, which is downloaded once. IMAGE is an image file, or - for standard input. With --csv it is a folder. The
    columns of the CSV file are the path below the folder, class and probability, the further classes, none_of_these if
    BUNDLE has a threshold, and the error of an image that cannot be read. An image is none of these if the probability
    of its most probable class is below the threshold.
    """
    from comkd_cli.edge.figures import misused_figures
    from comkd_cli.flows.predict import Table

    self_test, benchmark, seconds = (settings.pop(name) for name in ("self_test", "benchmark", "seconds"))
    others = _given({"csv_file", "fresh", "add_classes", "no_threshold", "top"})
    if problem := misused_figures(self_test, benchmark, images, others, seconds if _given({"seconds"}) else None):
        raise click.UsageError(problem)
    bundle = _local(bundle)
    if self_test:
        _print_self_test(bundle, settings["precision"], as_json)
        return
    if benchmark:
        _print_benchmark(bundle, settings["precision"], images, seconds, as_json)
        return
    if fresh and csv_file is None:
        raise click.UsageError("--fresh requires --csv")
    threshold = not settings.pop("no_threshold")
    if csv_file is None:
        settings["threshold"] = threshold
        _print_predictions(bundle, images, as_json, settings)
        return
    if as_json or len(images) != 1:
        raise click.UsageError("--csv requires exactly one folder of images and cannot be combined with --json")
    _write_table(bundle, Table(Path(images[0]), csv_file, fresh, threshold), settings)


def _local(bundle: Path) -> Path:
    """The folder of a bundle, which is downloaded if it is one of the Hub."""
    if not str(bundle).startswith("hf:") or bundle.exists():
        return bundle
    from comkd_cli.cli.terminal import starting

    with starting():
        from comkd_cli.flows.hub import HubBundle, cached_bundle

        return cached_bundle(HubBundle.parse(str(bundle)))


def _given(names: set[str]) -> list[str]:
    """Those of the options with these names that are on the command line."""
    context = click.get_current_context()
    return [
        option.opts[0]
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is not ParameterSource.DEFAULT
    ]


def _print_self_test(bundle: Path, precision: str | None, as_json: bool) -> None:
    from comkd_cli.cli.terminal import output, print_json
    from comkd_cli.errors import BundleError
    from comkd_cli.flows.predict import self_test

    tested = self_test(bundle, precision)
    if as_json:
        print_json(tested.document())
    else:
        output().print(tested.text(), markup=False, soft_wrap=True)
    if tested.differing:
        raise BundleError("differs from its reference on this machine", path=bundle, found=", ".join(tested.differing))


def _print_benchmark(
    bundle: Path, precision: str | None, images: tuple[str, ...], seconds: float, as_json: bool
) -> None:
    from comkd_cli.cli.terminal import output, print_json, reporting
    from comkd_cli.edge.benchmark import BenchmarkJob
    from comkd_cli.flows.predict import benchmark

    with reporting(quiet=as_json) as report:
        measured = benchmark(BenchmarkJob(bundle, precision, images[0] if images else None, seconds), report)
    if as_json:
        print_json(measured.document())
    else:
        output().print(measured.text(), markup=False, soft_wrap=True)


def _print_predictions(bundle: Path, images: tuple[str, ...], as_json: bool, settings: dict[str, Any]) -> None:
    from comkd_cli.cli.terminal import output, print_json
    from comkd_cli.edge.classifier import ADDED_NOTE, none_text
    from comkd_cli.errors import DataError
    from comkd_cli.flows.predict import predict

    records = predict(bundle, images, **settings)
    if settings["add_classes"] and any(record.get("none_of_these") is not None for record in records):
        click.echo(f"note: {ADDED_NOTE}", err=True)
    if as_json:
        print_json({"predictions": records})
    else:
        console = output()
        for record in records:
            if "classes" in record:
                console.print(record["image"], style="bold", markup=False, soft_wrap=True)
                if record["none_of_these"]:
                    console.print(f"  {none_text(record)}", style="yellow", markup=False, soft_wrap=True)
                for entry in record["classes"]:
                    line = f"  {entry['probability']:7.2%}  {entry['class']}"
                    console.print(line, markup=False, soft_wrap=True)
    if unreadable := [record["error"] for record in records if "error" in record]:
        raise DataError("some images could not be read:\n  " + "\n  ".join(unreadable))


def _write_table(bundle: Path, table: Table, settings: dict[str, Any]) -> None:
    from comkd_cli.cli.terminal import output, reporting
    from comkd_cli.edge.folder_csv import summary_text
    from comkd_cli.errors import DataError
    from comkd_cli.flows.predict import predict_folder

    with reporting() as report:
        summary = predict_folder(bundle, table, report=report, **settings)
    output().print(f"{table.path}: {summary_text(summary)}", markup=False, soft_wrap=True)
    if summary.unreadable == summary.images:
        raise DataError(
            "none of the images could be read", path=table.folder, remedy="see the column `error` of the table"
        )
