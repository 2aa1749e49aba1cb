"""Students of one teacher that differ in one setting: the objective, the images, the size, the classes.

    python -m benchmarks.ablation --data FOLDER --out FOLDER --dry-run
    python -m benchmarks.ablation --data FOLDER --out FOLDER [--study objectives] [--seeds 1 2 3] [--rows refinement]
    python -m benchmarks.ablation --data FOLDER --out OTHER --pair transformers

The studies are objectives, images, size, base_to_novel, tricks and long. --pair transformers is the paper's own regime:
two CLIPs of transformers are trained on a part of the classes and frozen, and prompts alone are trained in both. --pair
larger_teacher has the students of the first pair and a teacher of half as many parameters again. FOLDER of --data holds
train/ and test/ with a sub-folder for each class, such as CIFAR-10's. The teacher is trained once; each row is an
ordinary `comkd distill` over a recipe in OUT/recipes, and any of them can be repeated in OUT by the command in the
recipe's first line. Started again, the study resumes. Weights are chosen by a grid on training images that the student
is not trained on. Writes OUT/ablation.json and OUT/ablation.md after every run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.pairs import PAIRS, Settings
from benchmarks.ablation.rows import STUDIES, Row, grid_rows, pretraining, weights_name
from benchmarks.ablation.running import Job, Stopped, Study, circumstances, jobs_of, searched_by
from benchmarks.ablation.tables import grid_markdown, markdown, statistics_of
from comkd_cli.errors import ComkdError
from comkd_cli.files import write_text


def main(arguments: Sequence[str] | None = None, pairs: Mapping[str, Settings] = PAIRS) -> int:
    """Run what is missing; the exit code: 1 where a run failed, 130 where one was interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    settings = pairs[options.pair]
    study = Study(settings, options.out, options.data)
    rows = [row for name in options.study for row in STUDIES[name](settings)]
    if options.rows:
        if unknown := sorted(set(options.rows) - {row.name for row in rows}):
            parser.error(f"--rows: {', '.join(unknown)}: not among {', '.join(row.name for row in rows)}")
        rows = [row for row in rows if row.name in options.rows]
    jobs = jobs_of(rows, options.seeds)
    if options.dry_run:
        print(_plan(study, jobs, options.rate))
        return 0
    try:
        return _run(study, rows, jobs, options.adopt)
    except Stopped as stopped:
        print(f"interrupted: {stopped}; the same command continues", file=sys.stderr)
        return 130
    except ComkdError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="images, with train/ and test/")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the study; it continues there")
    parser.add_argument("--pair", choices=list(PAIRS), default=next(iter(PAIRS)), help="each needs an --out of its own")
    parser.add_argument("--study", nargs="+", choices=list(STUDIES), default=["objectives"])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows of the studies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="each row has some of these")
    parser.add_argument("--adopt", type=Path, metavar="JSON", help="take over the finished runs of this ablation.json")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs with an estimate of the time, and run nothing"
    )
    parser.add_argument("--rate", type=float, default=1000.0, help="images per second, for the estimate")
    return parser


def _run(study: Study, rows: Sequence[Row], jobs: Sequence[Job], adopted: Path | None) -> int:
    if adopted is not None:
        print(f"took over {study.adopt(json.loads(adopted.read_text(encoding='utf-8')))} finished runs from {adopted}")
    study.teach()
    grid, chosen = study.choose(searched_by(jobs))
    print(grid_markdown(grid, chosen), flush=True)
    failed = []
    for job in jobs:
        try:
            study.run(job, chosen)
        except ComkdError as error:
            failed.append(f"{job.name}: {error}")
            print(failed[-1], file=sys.stderr)
            continue
        _write(study, grid, chosen)
    print(_write(study, grid, chosen))
    if failed:
        print("\n".join(["failed, and tried again by the same command:", *failed]), file=sys.stderr)
    return 1 if failed else 0


def _write(study: Study, grid: Mapping[str, Mapping[str, float]], chosen: Mapping[str, float]) -> str:
    """Write the JSON and the tables of all that is finished, and return the tables."""
    everything = [row for rows in STUDIES.values() for row in rows(study.settings)]
    finished = {
        (job.row.name, job.seed): record
        for job in jobs_of(everything, range(1, study.settings.seeds + 1))
        if (record := study.record(job)) is not None
    }
    searched = [
        record
        for rows in grid_rows(study.settings).values()
        for row in rows
        if (record := study.record(Job(row, 1))) is not None
    ]
    found = [statistics for row in everything if (statistics := statistics_of(row, finished)) is not None]
    made = {path.stem: path.with_suffix(".json") for path in map(Path, pretraining(study.settings))}
    document: dict[str, Any] = {
        "pretrained": {
            name: json.loads((study.out / path).read_text(encoding="utf-8"))
            for name, path in made.items()
            if (study.out / path).is_file()
        },
        "grid": {"validation_top1_percent": grid, "chosen": chosen},
        "rows": found,
        "runs": [*searched, *finished.values()],
        **circumstances(),
    }
    origins = sorted({f"{run['revision']} on {run['machine']}" for run in document["runs"]})
    parts = [f"Code and machine: {'; '.join(origins)}.\n", f"## Weights\n\n{grid_markdown(grid, chosen)}"]
    for name in STUDIES:
        if of_study := [row for row in found if row["study"] == name]:
            parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n{markdown(of_study)}")
    text = "\n".join(parts)
    write_text(study.out / "ablation.json", json.dumps(document, indent=1) + "\n")
    write_text(study.out / "ablation.md", text)
    return text


def _plan(study: Study, jobs: Sequence[Job], rate: float) -> str:
    """The runs, whether they are finished, and how long the others take at so many images a second."""
    terms = searched_by(jobs)
    grid = [Job(row, 1) for term, rows in grid_rows(study.settings).items() if term in terms for row in rows]
    lines, total = [f"{'run':60} {'images':>8} {'epochs':>6}  minutes"], 0.0
    for job in [*grid, *jobs]:
        images = job.row.images or study.settings.image_counts[-1] // (2 if job.row.half else 1)
        minutes = 0.0 if study.record(job) is not None else images * job.row.epochs / rate / 60
        total += minutes
        state = f"{minutes:.1f}" if minutes else "finished"
        lines.append(f"{job.name:60} {images:>8,} {job.row.epochs:>6}  {state}")
    teacher = "" if (study.out / weights_name()).is_file() else ", and the teacher before them"
    lines.append(f"{len(grid) + len(jobs)} runs, {total / 60:.1f} hours at {rate:,.0f} images/s{teacher}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
