"""`comkd init`: a first recipe for a folder of images."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from comkd_cli.flows.init import Proposal

MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
MILLISECONDS = {"": 1.0, "ms": 1.0, "s": 1000.0}
MOST_CLASSES = 5  # that the summary names


def _amount(value: str, units: Mapping[str, float], parameter: click.Parameter, example: str) -> float:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", value.strip().lower())
    if found is None or found[2] not in units or not float(found[1]):
        raise click.BadParameter(f"{value!r} should be an amount such as {example}", param=parameter)
    return float(found[1]) * units[found[2]]


def _budget(_context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else int(_amount(value, MULTIPLES, parameter, "5M, 500k or 5000000"))


def _latency(_context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    return None if value is None else _amount(value, MILLISECONDS, parameter, "20ms")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--classes",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="FILE",
    help="Class names, one per line. Default: the sub-folders of train/.",
)
@click.option(
    "--budget", callback=_budget, metavar="PARAMETERS", help="Maximum number of student parameters, such as 5M or 500k."
)
@click.option(
    "--max-latency",
    callback=_latency,
    metavar="TIME",
    help="Maximum latency of the student for one image, such as 20ms, measured on this machine.",
)
@click.option(
    "--teacher", metavar="ARCH:WEIGHTS", help="Use this teacher: an open_clip architecture, and a tag or file."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The recipe to write; an existing file is never replaced.",
)
@click.option("--no-download", is_flag=True, help="Propose only weights that are on this machine.")
def command(
    folder: Path,
    classes: Path | None,
    budget: int | None,
    max_latency: float | None,
    out: Path,
    **models: str | bool | None,
) -> None:
    """Look at a FOLDER of images and write a recipe for it.

    The reason for each setting is above it. The names and sizes of all files are read, and the headers of some; nothing
    is decoded, downloaded or trained. Without --budget and --max-latency, the student has at most a tenth of the
    parameters of the teacher's image tower.
    """
    from comkd_cli.cli.terminal import reporting, starting

    if budget is not None and max_latency is not None:
        raise click.UsageError("--budget and --max-latency cannot be combined")
    with starting():
        from comkd_cli.flows.init import Request, already_exists, propose, write_recipe
        from comkd_cli.models.choice import Limit
    if out.exists():
        raise already_exists(out)
    teacher = models["teacher"]
    request = Request(
        folder=folder,
        classes=classes,
        limit=Limit(budget, max_latency),
        download=not models["no_download"],
        teacher=None if teacher is None else str(teacher),
    )
    with reporting() as report:
        proposal = propose(request, report)
    write_recipe(out, proposal.text)
    _print_summary(proposal, out)


def _print_summary(proposal: Proposal, out: Path) -> None:
    from comkd_cli.cli.terminal import output, print_pairs

    print_pairs(_rows(proposal))
    recipe = shlex.quote(str(out))
    output().print(
        f"\nWrote {out}. Next:\n  comkd distill {recipe} --dry-run\n  comkd distill {recipe}",
        markup=False,
        soft_wrap=True,
    )


def _rows(proposal: Proposal) -> dict[str, str]:
    """The summary, row by row; what needs the user's attention is its own row."""
    from comkd_cli.data.class_names import some
    from comkd_cli.recipe.commented import printable

    inspection, student, schedule = proposal.inspection, proposal.student, proposal.schedule
    source, sample, teacher = inspection.source, inspection.sample, proposal.teacher
    names = [printable(name) for name in source.class_names]
    splits = {"training": source.train, "test": source.test, "validation": source.val}
    counts = [f"{len(images):,} {name}" for name, images in splits.items() if images is not None and len(images)]
    labels = "labelled" if source.train.labels is not None else "no labels to train on"
    formats = ", ".join(f"{count:,} {suffix}" for suffix, count in inspection.suffixes.most_common())
    rows = {
        "images": f"{', '.join(counts)}, {labels}; {inspection.total_bytes / 1e6:,.1f} MB",
        "files": f"{formats}; median {sample.short_side} x {sample.long_side} pixels ({sample.images:,} headers read)",
        "classes": f"{len(names):,}: {some(names, MOST_CLASSES)}",
        **_attention(proposal),
        "teacher": f"{teacher.name}, image tower {teacher.image_tower_parameters / 1e6:.1f} M parameters",
        "student": f"{student.name}, {student.parameters / 1e6:.2f} M parameters, "
        f"{student.image_size} x {student.image_size} pixels"
        + (f", {student.milliseconds:.1f} ms on one thread" if student.milliseconds is not None else "")
        + (", pretrained on ImageNet" if student.pretrained else ", from scratch"),
        "training": f"{schedule.epochs} epochs of {schedule.steps_per_epoch:,} steps, batch {schedule.batch_size}",
    }
    return rows


def _attention(proposal: Proposal) -> dict[str, str]:
    """Possible problems of the folder, by kind; empty rows are not printed."""
    from comkd_cli.data.class_names import some
    from comkd_cli.flows.init import unreadable_files
    from comkd_cli.recipe.commented import printable

    inspection = proposal.inspection
    duplicates, sample = inspection.duplicates, inspection.sample
    unreadable, truncated = unreadable_files(inspection), sample.truncated
    copies = []
    if duplicates.copies:
        copies.append(f"{duplicates.copies:,} {'copy' if duplicates.copies == 1 else 'copies'} of other images")
    if duplicates.across_splits:
        first, other = duplicates.across_splits[0]
        copies.append(f"{len(duplicates.across_splits):,} test images are also in train/, such as {first} = {other}")
    if duplicates.across_classes:
        first, other = duplicates.across_classes[0]
        copies.append(f"{len(duplicates.across_classes):,} have two labels, such as {first} = {other}")
    found = {
        "unreadable": f"{len(unreadable):,}: {some(unreadable, 3)}" if unreadable else "",
        "truncated": f"{len(truncated):,} of {sample.images:,} sampled: {some(truncated, 3)}" if truncated else "",
        "duplicates": "; ".join(copies),
        "notes": "\n".join(inspection.notes),
    }
    return {name: "\n".join(map(printable, text.split("\n"))) for name, text in found.items()}
