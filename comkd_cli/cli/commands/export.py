"""`comkd export`: student to bundle."""

from __future__ import annotations

import math
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from comkd_cli.bundles.gates import GATES, INPUTS, PRECISIONS, TEXT, TEXT_GATE, TEXT_LIMITS, Gate, SpeedGate
from comkd_cli.cli.completing import complete_student
from comkd_cli.cli.options import allow_download_option, data_root_option, json_option, runs_option


def _positive(_context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not value > 0:  # NaN too
        raise click.BadParameter(f"{value} is not above 0", param=parameter)
    return value


@click.command()
@click.argument("student", type=click.Path(dir_okay=False, path_type=Path), shell_complete=complete_student)
@click.option("--onnx", is_flag=True, expose_value=False, help="ONNX, the default and only format; may be left out.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the bundle. Default: `bundle` beside STUDENT.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    default=("fp32",),
    show_default=True,
    help="Precision of the graphs; may be repeated. int8 is calibrated on images that its gate does not use.",
)
@click.option("--text", is_flag=True, help="Add the teacher's text encoder, so that a device can add classes.")
@click.option(
    "--text-student",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Add this text encoder, written by `comkd distill-text`, instead of the teacher's.",
)
@click.option(
    "--text-precision",
    "text_precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Precision of the text encoder; may be repeated. Default: same as --precision.",
)
@click.option("--web", is_flag=True, help="Add a web page that classifies images in the browser itself.")
@click.option(
    "--web-runtime",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Unpacked onnxruntime-web package for --web. Default: npm downloads it once.",
)
@click.option("--benchmark", is_flag=True, help="Measure latency and peak memory, and compare them with PyTorch's.")
@click.option(
    "--images",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder of images for the gates and int8. Default: the student's own data.",
)
@click.option(
    "--check-images",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Compare the graphs with PyTorch on at most this many images.",
)
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="PRECISION.LIMIT=VALUE",
    help="Change a limit that graphs of a precision must meet, such as int8.cosine_min=0.97; may be repeated.",
)
@click.option(
    "--max-latency-ms",
    type=float,
    callback=_positive,
    metavar="MS",
    help="Leave out precisions that take longer than this for an image on one thread of this machine; with --batch, "
    "the time of a batch divided by its size.",
)
@click.option(
    "--min-speedup",
    type=float,
    callback=_positive,
    metavar="X",
    help="Leave out a precision that is not X times as fast as eager PyTorch, for one image on one thread.",
)
@click.option(
    "--accept",
    "accept_percent",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    default=95.0,
    show_default=True,
    metavar="PERCENT",
    help="Set the threshold for 'none of these' so that this share of held-out images reaches it.",
)
@click.option(
    "--negatives",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder of images that show none of the classes: reports how many the threshold wrongly accepts.",
)
@click.option(
    "--opset", type=click.IntRange(min=13), default=20, show_default=True, help="Version of the ONNX operators."
)
@click.option(
    "--input",
    "inputs",
    type=click.Choice(INPUTS),
    multiple=True,
    help="Also export graphs that include the pre-processing: `pixels` accepts uint8 images of the model's size, "
    "`image` of any size; may be repeated.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), help="Fix the batch size and every shape. Default: any batch size."
)
@click.option("--license", "license_", default="unknown", show_default=True, help="Licence to state in the model card.")
@runs_option
@data_root_option
@allow_download_option
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
def command(  # noqa: PLR0913 - click passes each option as a parameter
    student: Path,
    out: Path | None,
    precisions: tuple[str, ...],
    text: bool,
    text_student: Path | None,
    text_precisions: tuple[str, ...],
    web: bool,
    web_runtime: Path | None,
    benchmark: bool,
    images: Path | None,
    check_images: int,
    gates: tuple[str, ...],
    max_latency_ms: float | None,
    min_speedup: float | None,
    accept_percent: float,
    negatives: Path | None,
    opset: int,
    inputs: tuple[str, ...],
    batch: int | None,
    license_: str,
    runs: Path,
    data_root: Path,
    allow_download: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Export STUDENT.pt to a bundle of checked ONNX graphs.

    The bundle has a predict.py that needs no torch. In onnxruntime, the graphs must reproduce the student's answers on
    real images, at batch sizes 1, 2 and 7 (or at --batch), and for every class. A precision or an input that misses its
    gate is left out of the bundle, its figures are printed, and the exit code is 1. int8 is calibrated and chosen on
    images that its gate does not use. The temperature of the probabilities and the threshold below which an image is
    none of the classes are fitted on other held-out images, if there are enough. Limits of --gate: cosine_min,
    agreement_min_percent, top1_loss_max_points, difference_max. The text encoder in fp16 or int8 has its own gate
    (`text.cosine_min`, `text.agreement_min_percent`): a cosine of at least 0.995 with the fp32 vector of every name and
    a top-1 agreement of at least 99.5 %.
    """
    # Longer than 60 lines because each of its options is a parameter and a field.
    from comkd_cli.cli.terminal import reporting, starting

    if text and text_student is not None:
        raise click.UsageError("--text and --text-student cannot be combined: a bundle has one text encoder")
    if text_precisions and not (text or text_student):
        raise click.UsageError("--text-precision needs --text or --text-student")
    target = out or student.parent / "bundle"
    with starting():
        from comkd_cli.flows import export
    options = export.ExportOptions(
        precisions=precisions,
        text=text or text_student is not None,
        text_student=text_student,
        text_precisions=text_precisions,
        web=web or web_runtime is not None,
        web_runtime=web_runtime,
        benchmark=benchmark,
        opset=opset,
        inputs=inputs,
        batch=batch,
        gates=_gates(gates),
        speed=SpeedGate(max_latency_ms, min_speedup),
        check_images=check_images,
        pictures=images,
        runs=runs,
        allow_download=allow_download,
        license=license_,
        accept_percent=accept_percent,
        negatives=negatives,
    )
    with reporting(quiet=as_json) as report:
        exported = export.export(student, target, data_root, report, force, options)
    _print_outcome(target, exported.manifest, exported.failed, as_json)


def _print_outcome(target: Path, manifest: dict[str, Any], failed: dict[str, str], as_json: bool) -> None:
    """Raises ExportError, with the reasons, if something that was requested is not in the bundle."""
    from comkd_cli.cli.terminal import print_json
    from comkd_cli.errors import ExportError

    if as_json:
        print_json(manifest)
    else:
        _print_bundle(target, manifest)
    if failed:
        reasons = "\n".join(f"  {name}: {why}" for name, why in failed.items())
        raise ExportError(f"the bundle was written without {', '.join(failed)}, which failed:\n{reasons}", path=target)


def _gates(settings: tuple[str, ...]) -> dict[str, Gate]:
    """The default gates, changed by the limits of the command line."""
    changed = {**GATES, TEXT: TEXT_GATE}
    limits = [limit.name for limit in fields(GATES["fp32"])]
    for setting in settings:
        name, equals, value = setting.partition("=")
        precision, _, limit = name.partition(".")
        if not equals or precision not in changed or limit not in limits:
            raise click.UsageError(
                f"--gate {setting}: should be PRECISION.LIMIT=VALUE, with {', '.join(changed)} and {', '.join(limits)}"
            )
        if precision == TEXT and limit not in TEXT_LIMITS:
            raise click.UsageError(f"--gate {setting}: {TEXT} has only the limits {', '.join(TEXT_LIMITS)}")
        try:
            number = float(value)
        except ValueError as error:
            raise click.UsageError(f"--gate {setting}: {value!r} is not a number") from error
        if math.isnan(number):  # every comparison with it is false
            raise click.UsageError(f"--gate {setting}: {value!r} is not a number")
        changed[precision] = replace(changed[precision], **{limit: number})
    return changed


def _print_bundle(target: Path, manifest: dict[str, Any]) -> None:
    from rich.filesize import decimal

    from comkd_cli.bundles.confidence_text import confidence_lines
    from comkd_cli.bundles.latency import disturbance
    from comkd_cli.cli.terminal import Column, output, print_table

    console = output()
    sizes: dict[str, int] = {}
    for name, entry in manifest["files"].items():  # the files of a folder in one row
        row = "".join(name.partition("/")[:2])
        sizes[row] = sizes.get(row, 0) + entry["bytes"]
    print_table([Column("file", "text"), Column("size")], [(name, decimal(size)) for name, size in sizes.items()])
    console.print()
    _print_parity(manifest)
    console.print(_image_sizes(manifest["images"]), style="dim", markup=False, soft_wrap=True)
    for line in confidence_lines(manifest):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    if manifest["latency"]:
        console.print()
        _print_latency(manifest)
        if disturbed := disturbance(manifest["latency"]):
            console.print(disturbed, style="yellow", markup=False, soft_wrap=True)
    quoted = shlex.quote(str(target))
    console.print(
        f"bundle: {target}\n  comkd predict {quoted} IMAGE...\n  comkd predict {quoted} --self-test",
        markup=False,
        soft_wrap=True,
    )
    if "index.html" in manifest["files"]:
        console.print(f"  python -m http.server --directory {quoted}", markup=False, soft_wrap=True)


def _print_parity(manifest: dict[str, Any]) -> None:
    from comkd_cli.cli.terminal import Column, print_table

    heads = ("of fp32's size", "smallest cosine", "top-1 agreement", "95 % interval", "top-1")
    sizes = {p: manifest["files"][e["classifier"]]["bytes"] for p, e in manifest["precisions"].items()}
    rows = []
    for precision, entry in manifest["precisions"].items():
        parity = entry["parity"]
        share = f"{sizes[precision] / sizes['fp32']:.2f}" if "fp32" in sizes else "-"
        top1 = "-" if parity["top1_percent"] is None else f"{parity['top1_percent']:.2f} %"
        same = f"{parity['top1_agreement_percent']:.2f} %"
        low, high = parity["top1_agreement_interval_percent"]
        cosine = f"{parity['feature_cosine_min']:.6f}"
        rows.append((precision, share, cosine, same, f"{low:.1f} to {high:.1f} %", top1))
    print_table([Column("precision", "word"), *map(Column, heads)], rows)


def _image_sizes(images: dict[str, Any]) -> str:
    """`gate: 360 test images; calibrate: 144 training images; choose: 48`, and why a top-1 may be missing."""
    from comkd_cli.bundles.parts import PartSize

    sizes = {name: PartSize(**images[name]) for name in ("gate", "calibrate", "choose")}
    text = f"gate: {sizes['gate'].words(scored=True)}"
    if sizes["calibrate"].images:
        text += f"; int8 calibrated on {sizes['calibrate'].words()}, chosen on {sizes['choose'].words()}"
    if images["unreadable"]:
        text += f"; {images['unreadable']} could not be read"
    if not sizes["gate"].labels:
        text += "; no top-1: no held-out labelled images"
    return text


def _print_latency(manifest: dict[str, Any]) -> None:
    from comkd_cli.bundles.latency import measured_batch
    from comkd_cli.cli.terminal import Column, print_table

    heads = ("threads", "ms", "speed-up", "peak MiB", "of PyTorch's")
    rows = [
        (
            entry["name"],
            str(entry["threads"]),
            f"{1e3 * entry['seconds']:.2f}",
            f"{entry['speed_up']:.2f}x",
            f"{entry['peak_bytes'] / 2**20:.0f}",
            f"{entry['memory_share']:.2f}",
        )
        for entry in manifest["latency"]
    ]
    print_table([Column(measured_batch(manifest), "word"), *map(Column, heads)], rows)
