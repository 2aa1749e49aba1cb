"""Runs the rows: links to images, the teacher, the grid of weights, and `comkd distill` for each row and seed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from benchmarks.ablation.figures import Scorer
from benchmarks.ablation.pairs import Fields, Settings
from benchmarks.ablation.rows import Row, grid_rows, pretraining, pretraining_recipe, recipe_of, weights_name
from comkd_cli.data.folder import images_below
from comkd_cli.edge.machine import cpu_name
from comkd_cli.errors import ComkdError
from comkd_cli.files import sha256_of_data, sha256_of_file, write_text
from comkd_cli.models.checkpoints import load_teacher

ROOT = Path(__file__).parents[2]
INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that was stopped, which saves a checkpoint where it can."""


class Stopped(Exception):
    """A run was interrupted; the same command resumes it."""


@dataclass(frozen=True)
class Job:
    """One run of a row."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Of its record."""
        return f"{self.row.name}-seed{self.seed}"


def jobs_of(rows: Sequence[Row], seeds: Sequence[int]) -> list[Job]:
    """Every row with the first seed, then with the second, so that the finished runs are balanced at any time."""
    return [Job(row, seed) for seed in seeds for row in rows if seed <= row.seeds]


def searched_by(jobs: Sequence[Job]) -> set[str]:
    """The terms whose weights a grid has to choose before these jobs."""
    return {term for job in jobs for term in job.row.searched}


class Study:
    """A folder with the images, the teacher, every run and a record of each.

    out: the study's folder, where it can be resumed at any time. data: a folder with train/ and test/, a sub-folder
    for each class.
    """

    def __init__(self, settings: Settings, out: Path, data: Path) -> None:
        self.settings = settings
        self.out = out.resolve()
        self.data = data.resolve()
        self._scorer: Scorer | None = None

    # Images

    def folder_of(self, row: Row) -> str:
        """The images of a row, below the study's folder, made of links where they are not all images."""
        if row.study == "grid":
            return self._linked("grid", row.images, held_out=True)
        if row.half:
            self._halve()
            return "data/base"
        return self._linked("all" if row.images is None else f"train-{row.images}", row.images)

    def _halve(self) -> None:
        middle = (self.settings.classes + 1) // 2
        self._link_classes("base", slice(middle))
        self._link_classes("novel", slice(middle, None))

    def _link_classes(self, folder: str, which: slice) -> None:
        names = sorted(path.name for path in (self.data / "train").iterdir() if path.is_dir())
        for split in ("train", "test"):
            for name in names[which]:
                _link(self.data / split / name, self.out / "data" / folder / split / name)

    def _linked(self, name: str, count: int | None, held_out: bool = False) -> str:
        folder = self.out / "data" / name
        if not folder.exists():
            if count is None:
                _link(self.data, folder)
            else:
                self._link_subset(folder, count, held_out)
        return f"data/{name}"

    def _link_subset(self, folder: Path, count: int, held_out: bool) -> None:
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        for label in sorted(path for path in (self.data / "train").iterdir() if path.is_dir()):
            images = shuffled(label)
            held = round(len(images) * self.settings.validation_share)
            kept = count // self.settings.classes
            if kept + held > len(images):
                problem = f"too few images: the study needs {kept + held} of each class"
                raise ComkdError(problem, path=label, found=len(images))
            for image in images[:kept]:
                _link(image, unfinished / "train" / label.name / image.name)
            if held_out:
                for image in images[len(images) - held :]:
                    _link(image, unfinished / "test" / label.name / image.name)
        if not held_out:
            _link(self.data / "test", unfinished / "test")
        unfinished.rename(folder)

    # Runs

    def distill(self, name: str, recipe: Mapping[str, Any], *options: str) -> tuple[str, float]:
        """Run `comkd distill` on a recipe, in the study's folder; the command and its wall time in seconds.

        Raises Stopped for an interrupted run and ComkdError for a failed one.
        """
        words = ["distill", f"recipes/{name}.yaml", *options, "--runs", "runs"]
        command = shlex.join(["comkd", *words])
        write_text(self.out / "recipes" / f"{name}.yaml", f"# {command}\n{as_yaml(recipe)}")
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "comkd_cli", *words], cwd=self.out, env=environment())
        code = _wait(process)
        if code in INTERRUPTED:
            raise Stopped(command)
        if code:
            raise ComkdError("failed", path=command, found=f"exit code {code}", remedy="see its message above")
        return command, time.monotonic() - started

    def teach(self) -> str:
        """Train the teacher, and the students' frozen CLIPs, unless they exist; the digest of all their weights."""
        digests = [
            sha256_of_file(self._pretrained(name, config)) for name, config in pretraining(self.settings).items()
        ]
        return digests[0] if len(digests) == 1 else sha256_of_data(digests)

    def _pretrained(self, name: str, config: Fields) -> Path:
        weights = self.out / name
        if not weights.is_file():
            recipe = pretraining_recipe(config, self.settings, self._pretraining_folder())
            command, seconds = self.distill(weights.stem, recipe, "--precompute")
            saved = max((self.out / "runs" / "teachers").glob("*/teacher.pt"), key=lambda path: path.stat().st_mtime_ns)
            record = {"command": command, "recipe": recipe, "wall_seconds": seconds, **circumstances()}
            write_text(weights.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
            torch.save(load_teacher(saved).state_dict, weights)
        return weights

    def _pretraining_folder(self) -> str:
        if self.settings.pretrained_classes is None:
            return self._linked("all", None)
        self._link_classes("pretraining", slice(self.settings.pretrained_classes))
        return "data/pretraining"

    def choose(self, terms: Collection[str]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Each term's grid, as validation top-1 in percent by weight, and the weight that it chose.

        Runs what is missing for these terms; other terms are included if their runs are finished. The weight is the
        best one on training images that the student was not given, the least of equals; the test images have no part
        in it.
        """
        grid = {
            term: {f"{row.weights[term]:g}": self.run(Job(row, 1), {})["figures"]["top1_percent"] for row in rows}
            for term, rows in grid_rows(self.settings).items()
            if term in terms or all(self.record(Job(row, 1)) for row in rows)
        }
        return grid, {term: float(max(scores, key=lambda weight: scores[weight])) for term, scores in grid.items()}

    def run(self, job: Job, chosen: Mapping[str, float]) -> dict[str, Any]:
        """The record of a job, which is run unless it is finished. Raises ComkdError if it fails."""
        folder = self.folder_of(job.row)
        recipe = recipe_of(job.row, self.settings, chosen, folder)
        teacher = self.teach()
        kept = self.record(job)
        if kept is not None and kept["recipe"] == recipe and kept["teacher_sha256"] == teacher:
            return kept
        options = ["--seed", str(job.seed), *(["--fresh"] if kept is not None else [])]
        command, seconds = self.distill(job.row.name, recipe, *options)
        runs = self.out / "runs" / job.row.name / (self.out / folder).resolve().name / f"seed{job.seed}"
        if self._scorer is None:
            self._scorer = Scorer(self.out / weights_name())
        record: dict[str, Any] = {
            "study": job.row.study,
            "row": job.row.name,
            "seed": job.seed,
            "command": command.replace(" --fresh", ""),
            "recipe": recipe,
            "teacher_sha256": teacher,
            "wall_seconds": seconds,
            "training_seconds": training_seconds(runs / "metrics.jsonl", images_of(self.out / folder / "train")),
            **circumstances(),
        }
        with _inside(self.out):  # which the weights of a frozen student are relative to
            record["figures"] = self._scorer.figures(runs / "student.pt", self.out / folder)
            if job.row.half:
                record["figures"] |= self._scorer.novel_figures(runs / "student.pt", self.out / "data" / "novel")
        write_text(self.record_file(job), json.dumps(record, indent=2) + "\n")
        return record

    # Records

    def record_file(self, job: Job) -> Path:
        """Where a finished job's record is."""
        return self.out / "records" / f"{job.name}.json"

    def record(self, job: Job) -> dict[str, Any] | None:
        """The record of a job that was finished, or None."""
        path = self.record_file(job)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def adopt(self, document: Mapping[str, Any]) -> int:
        """Take over the records of an earlier study's JSON that this study does not have; returns their number.

        Raises ComkdError if they belong to another teacher.
        """
        teacher, taken = self.teach(), 0
        for record in document["runs"]:
            if record["teacher_sha256"] != teacher:
                problem = f"its teacher is not {self.out / weights_name()}, so its figures cannot be compared"
                raise ComkdError(problem, path=record["row"])
            path = self.out / "records" / f"{record['row']}-seed{record['seed']}.json"
            if not path.is_file():
                write_text(path, json.dumps(record, indent=2) + "\n")
                taken += 1
        return taken


def shuffled(folder: Path) -> list[Path]:
    """The images of a folder in an order that depends on their names alone: the first n are a random sample."""
    paths = [folder / key for key in images_below(folder).keys]
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())


def images_of(folder: Path) -> int:
    """How many images a folder holds."""
    return len(images_below(folder))


def training_seconds(metrics: Path, images: int) -> float:
    """What the epochs took, whether or not the run was interrupted between them."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return sum(images / line["images_per_second"] for line in lines)


def as_yaml(fields: Mapping[str, Any]) -> str:
    """Plain data as YAML."""
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.representer.ignore_aliases = lambda _data: True  # configs that are used twice are written twice
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(dict(fields), stream)
    return stream.getvalue()


def environment() -> dict[str, str]:
    """Of a process that imports this checkout's comkd in any folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def circumstances() -> dict[str, Any]:
    """When, by which code and on which machine."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": _revision(),
        "machine": _machine(),
    }


def _revision() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(target)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code. An interruption from the keyboard reaches the run too, which then saves its state."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
