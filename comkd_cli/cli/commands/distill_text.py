"""`comkd distill-text`: a small text encoder for bundles."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comkd_cli.cli.completing import complete_student
from comkd_cli.cli.options import allow_download_option, data_root_option, json_option, runs_option

if TYPE_CHECKING:
    from comkd_cli.flows.distill_text import DistilledText


@click.command()
@click.argument("student", type=click.Path(dir_okay=False, path_type=Path), shell_complete=complete_student)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the text encoder. Default: `text_student.pt` beside STUDENT.",
)
@click.option(
    "--names",
    "name_files",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Also train on the names in this file, one per line; may be repeated.",
)
@click.option("--own-names-only", is_flag=True, help="Train only on STUDENT's classes and --names.")
@click.option(
    "--holdout-percent",
    type=click.FloatRange(min=0, max=100, min_open=True, max_open=True),
    default=10.0,
    show_default=True,
    help="Share of names held out for scoring.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True, help="Passes over the prompts.")
@click.option("--batch-size", type=click.IntRange(min=2), default=256, show_default=True, help="Prompts per step.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Peak learning rate of AdamW.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of weights and order.")
@click.option("--fresh", is_flag=True, help="Start from scratch, discarding an existing file and checkpoint.")
@runs_option
@data_root_option
@allow_download_option
@json_option
def command(  # noqa: PLR0913 - click passes each option as a parameter
    student: Path,
    out: Path | None,
    name_files: tuple[Path, ...],
    own_names_only: bool,
    holdout_percent: float,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    fresh: bool,
    runs: Path,
    data_root: Path,
    allow_download: bool,
    as_json: bool,
) -> None:
    """Distil a teacher's text encoder into a small one.

    The teacher is that of STUDENT.pt. `comkd export --text-student` adds the small encoder to a bundle. It has at most
    1/8 of the parameters. It learns the teacher's vectors of prompts that contain names: STUDENT's classes, --names,
    the classes of the suite's datasets below the data root and of ImageNet, and the WordNet nouns in ImageNet-21k. The
    figures are measured on held-out names, which are chosen by a digest of the name. An interrupted run is resumed; the
    teacher encodes each prompt once.
    """
    from comkd_cli.cli.terminal import print_json, reporting, starting

    with starting():
        from comkd_cli.flows.distill_text import DistillTextOptions, distill_text
        from comkd_cli.training.accelerator import make_accelerator

        accelerator = make_accelerator("fp32")
    options = DistillTextOptions(
        out=out,
        name_files=name_files,
        own_names_only=own_names_only,
        held_out_percent=holdout_percent,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        fresh=fresh,
        data_root=data_root,
        runs=runs,
        allow_download=allow_download,
        resume_line=shlex.join(["comkd", *(word for word in sys.argv[1:] if word != "--fresh")]),
    )
    with reporting(quiet=as_json) as report:
        made = distill_text(student, accelerator, options, report)
    if as_json:
        print_json(_document(made))
    else:
        _print(made, student)


def _document(made: DistilledText) -> dict[str, object]:
    record = made.record
    return {
        "text_student": str(made.path),
        "parameters": record.parameters,
        "teacher_parameters": record.teacher_parameters,
        "tokens": len(record.vocabulary),
        "names": dict(made.origins),
        **record.metrics,
    }


def _print(made: DistilledText, student: Path) -> None:
    from comkd_cli.cli.terminal import Column, output, print_table

    record, figures = made.record, made.record.metrics
    names = ", ".join(f"{count:,} of {origin}" for origin, count in made.origins.items())
    share = record.parameters / record.teacher_parameters
    rows = [
        ("parameters", f"{record.parameters:,}, {share:.3f} of the teacher's {record.teacher_parameters:,}"),
        ("tokens", f"{len(record.vocabulary):,}"),
        ("names", names),
        ("held-out names", f"{figures['held_out_names']:.0f}"),
        ("  cosine, mean", f"{figures['held_out_cosine_mean']:.4f} (constant: {figures['constant_cosine_mean']:.4f})"),
        ("  cosine, worst", f"{figures['held_out_cosine_min']:.4f}"),
        ("  nearest vector has the same name", f"{figures['held_out_retrieval_percent']:.1f} %"),
        ("classes trained on", f"{figures['classes_trained_on']:.0f} of {figures['classes']:.0f}"),
    ]
    if "images" in figures:
        rows.append(("same top-1", f"{figures['image_agreement_percent']:.1f} % of {figures['images']:.0f} images"))
    if "new_class_agreement_percent" in figures:
        rows.append(("  held-out classes only", f"{figures['new_class_agreement_percent']:.1f} %"))
    if "image_top1_percent" in figures:
        teachers = figures["teacher_vectors_top1_percent"]
        rows.append(("top-1", f"{figures['image_top1_percent']:.1f} % (teacher's vectors: {teachers:.1f} %)"))
    print_table([Column("text encoder", "text"), Column("")], rows)
    command = shlex.join(["comkd", "export", str(student), "--text-student", str(made.path)])
    output().print(f"text encoder: {made.path}\n  {command}", markup=False, soft_wrap=True)
