"""Scores of students, of their teachers, and of plain CLIP models; nothing is trained on test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comkd_cli.data.loaders import worker_count
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.sources import open_source
from comkd_cli.data.unreadable import check_unreadable
from comkd_cli.errors import CheckpointError, ComkdError, DataError, MisuseError, ModelError
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.evaluation.features import Features, FeatureStore
from comkd_cli.evaluation.metrics import agreement_percent
from comkd_cli.evaluation.protocols import STANDARD_SEEDS, STANDARD_SHOTS, base_to_novel, few_shot, zero_shot
from comkd_cli.evaluation.subjects import Subject, student_subject, teacher_subject
from comkd_cli.events import Notice, Report, Stage, once
from comkd_cli.files import sha256_of_data, sha256_of_file
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import IMAGENET_TEMPLATES, Clip, build_clip, weights_sha256
from comkd_cli.models.checkpoints import StudentRecord, load_student
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.model import SCHEMES, Data, Model, Teacher
from comkd_cli.results.records import Missing, Record, Results, merged
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.devices import failures_explained
from comkd_cli.teachers.class_vectors import encode_ensemble
from comkd_cli.teachers.loading import teacher_of_clip
from comkd_cli.teachers.of_student import teacher_of_student

IMAGENET_FAMILY = tuple(name for name, dataset in CATALOG.items() if dataset.layout.startswith("imagenet"))
VARIANTS = tuple(name for name, dataset in CATALOG.items() if dataset.layout == "imagenet-variant")
MOST_NAMED = 10
FOR_MEMORY = "end other programs, or use a machine with more memory"
# What students that count as seeds of one recipe may differ in.
NOT_SETTINGS = {"about", "seed", "data", "evaluate_every_epochs", "checkpointing", "collective_timeout_minutes"}
MOST_FOR_AGREEMENT = 50_000  # training images to compare answers on: more would change the share by under 0.5 points


@dataclass(frozen=True)
class Bench:
    """Where, on what and by which protocols models are scored."""

    device: torch.device
    data_root: Path
    report: Report
    runs: Path = Path("runs")
    """Folder of all runs, where the index of shards is kept."""
    features: Path | None = None
    """Folder of kept features; None keeps none."""
    data: Data | None = None
    """Instead of the data that a student learned from."""
    datasets: tuple[str, ...] = ()
    """Several data sets, by name; each that can't be scored is a row of its own."""
    protocols: tuple[str, ...] = ("zero-shot",)
    protocols_named: bool = False
    """Whether the user chose the protocols: one that does not apply to some data is then a notice."""
    shots: tuple[int, ...] = STANDARD_SHOTS
    seeds: tuple[int, ...] = STANDARD_SEEDS
    allow_download: bool = False
    """Fetch what a student.pt names and this machine lacks."""
    clips: dict[str, Clip] = field(default_factory=dict)
    """Plain CLIPs that were loaded, by argument: one serves every data set."""
    recipes: dict[Path, tuple[Path, Recipe]] = field(default_factory=dict)
    """By folder of a run's seeds, the first student that was scored and its recipe."""

    def open_source(self, data: Data) -> Source:
        """The images and classes of some data, the same in every process."""
        return collectives.in_turn(partial(open_source, data, self.data_root, self.runs, self.report))


@dataclass(frozen=True)
class Job:
    """One model to score on one data set."""

    work: Callable[[], Results]
    dataset: str = ""
    """Its name, where there are several."""
    model: str | None = None
    """None where no student was found."""
    absent: bool = False
    """Whether the data set or its student is not there at all, so that the work can only fail."""


def evaluate(
    model: str | None, runs: Path, bench: Bench, keep: Callable[[Results], None] = lambda results: None
) -> Results:
    """The scores of a student.pt, of ARCH:WEIGHTS, or with None of each data set's newest students.

    With several models or data sets, one that cannot be scored is a row that says why. keep: called with the new
    results whenever a model is scored on a data set, so that a process that is killed loses none of them. Raises the
    error of what was asked for where nothing at all could be scored.
    """
    bench = replace(bench, runs=runs, report=once(bench.report, set()))  # many models meet the same
    results = Results([])
    problems: list[Exception] = []
    for job in _jobs(model, runs, bench):
        try:
            with failures_explained(FOR_MEMORY):
                found = job.work()
        except _mendable() as error:
            problems.append(error)
            entry = Missing(job.dataset, _told(error), job.model, failed=not job.absent)
            results = merged(results, Results([], [entry]))
            continue
        if found.records:
            keep(found)
        results = merged(results, found)
        _report_inapplicable(job, found, bench)
    if not results.records and not problems:
        asked = ", ".join(bench.protocols)
        raise DataError(f"nothing to score: {asked} does not apply to the models and data sets that were given")
    if not results.records:
        raise problems[0] if len(problems) == 1 else DataError("\n".join(entry.line for entry in results.missing))
    if results.missing:
        keep(Results([], results.missing))
    return results


def home_of(model: str | None, runs: Path, own_data: bool) -> Path:
    """Where results.json goes if nobody says: beside a student scored on its own data, else into `runs`."""
    beside = model is not None and own_data and Path(model).is_file()
    return Path(str(model)).parent if beside else runs


def newest_students(runs: Path) -> dict[str, list[Path]]:
    """For each data set, by name, the students of every seed of the recipe that was finished last on it."""
    found = sorted(runs.glob("*/*/seed*/student.pt"), key=lambda path: path.stat().st_mtime)
    newest = {path.parent.parent.name: path.parent.parent for path in found}
    return {name: sorted(folder.glob("seed*/student.pt")) for name, folder in newest.items()}


def _mendable() -> tuple[type[Exception], ...]:
    """The errors of one model on one data set that leave the others to be scored.

    With several processes only those that all of them meet: one that failed alone would leave the others waiting.
    """
    alone = ranks.world_size() == 1
    return (ComkdError, OSError) if alone else (DataError, CheckpointError, ModelError)


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _report_inapplicable(job: Job, found: Results, bench: Bench) -> None:
    """Name the protocols that a user asked for and that gave no record."""
    lacking = [name for name in bench.protocols if name not in {record.protocol for record in found.records}]
    if bench.protocols_named and lacking:
        on = " on ".join(filter(None, (job.model, job.dataset)))
        bench.report(Notice(f"{on}: {', '.join(lacking)} does not apply there and was left out"))


def _jobs(model: str | None, runs: Path, bench: Bench) -> list[Job]:
    """What to score, one model on one data set each."""
    if model is None:
        return _student_jobs(runs, bench)
    path = Path(model)
    is_student = path.exists() or (model.endswith(".pt") and ":" not in model)
    score: Callable[[Bench], Results] = partial(_score_student, path) if is_student else partial(_score_baseline, model)
    if not bench.datasets:
        return [Job(partial(score, bench), model=model)]
    own = {name: replace(bench, data=Data(dataset=name)) for name in bench.datasets}
    return [Job(partial(score, own[name]), name, model, _data_is_absent(name, bench)) for name in bench.datasets]


def _student_jobs(runs: Path, bench: Bench) -> list[Job]:
    students = newest_students(runs)
    if not bench.datasets:
        if not students:
            raise DataError(f"{runs}: holds no finished student; make one with `comkd distill digits`")
        return [
            Job(partial(_score_student, path, bench), name, str(path))
            for name, seeds in students.items()
            for path in seeds
        ]

    def no_student(name: str) -> Results:
        raise DataError(f"{name}: no student below {runs}; make one with `comkd distill RECIPE --dataset {name}`")

    jobs: list[Job] = []
    for name in bench.datasets:
        absent = _data_is_absent(name, bench)
        jobs += [Job(partial(_score_student, path, bench), name, str(path), absent) for path in students.get(name, [])]
        if name not in students:
            jobs.append(Job(partial(no_student, name), name, absent=True))
    return jobs


def _data_is_absent(name: str, bench: Bench) -> bool:
    return name in CATALOG and not (bench.data_root / CATALOG[name].folder).is_dir()


def _score_student(path: Path, bench: Bench) -> Results:
    """A student and its teacher on the test images of its data, or of the bench's.

    Where there are no test images, or none with labels, what is left is how often the two agree. A teacher
    that can't be found is a notice, and the student is scored alone.
    """
    student, record = collectives.on_every_rank(partial(load_student, path, bench.allow_download))
    _report_other_settings(path, record, bench)
    data = bench.data or record.recipe.data
    source = bench.open_source(data)
    check_classes(record, source)
    bench = _fitting_protocols(record, bench)
    subject = student_subject(student, record, sha256_of_file(path), str(path), bench.device)
    images = _scored_images(source, bench.report)
    store = _store(bench, data)
    limit = data.unreadable_limit_percent
    records, predicted = _score(subject, source, images, store, bench, "student", limit)
    try:
        teacher = collectives.on_every_rank(partial(_teacher_of, path, student, record, bench))
    except (ComkdError, OSError) as error:
        bench.report(Notice(f"the teacher can't be scored beside the student: {_told(error)}"))
        return Results(records)
    try:
        with failures_explained(FOR_MEMORY):
            taught, teacher_predicted = _score(teacher, source, images, store, bench, "teacher", limit)
    except _mendable() as error:  # what was found of the student counts
        return Results(records, [Missing(source.name, _told(error), teacher.model, failed=True)])
    agreement = agreement_percent(*_on_common(predicted, teacher_predicted))
    whole = [replace(entry, agreement_percent=agreement) if entry.classes == "all" else entry for entry in records]
    return Results([*whole, *taught])


def _report_other_settings(path: Path, record: StudentRecord, bench: Bench) -> None:
    """Say so where the seeds of one folder, which tables take the mean of, were made by different recipes."""
    first, recipe = bench.recipes.setdefault(path.parent.parent, (path, record.recipe))
    left, right = (_flat(of.model_dump(mode="json", exclude=NOT_SETTINGS)) for of in (recipe, record.recipe))
    if differing := sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name)):
        bench.report(
            Notice(
                f"{path}: was made by other settings than {first} ({', '.join(differing[:5])}), and tables take the "
                "mean of both as seeds of one recipe; distil one of them again with --fresh"
            )
        )


def _flat(fields: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested fields by their dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{at}{name}.") if isinstance(value, dict) else {f"{at}{name}": value}
    return flat


def _score_baseline(argument: str, bench: Bench) -> Results:
    """A plain CLIP, given as ARCH:WEIGHTS, on the test images of the bench's data."""
    if bench.data is None:
        raise MisuseError(f"{argument}: say on what to score it, with --dataset, --folder or --all")
    model = _parse_argument(argument)
    source = bench.open_source(bench.data)
    images = _scored_images(source, bench.report)
    if argument not in bench.clips:
        bench.clips[argument] = collectives.on_every_rank(partial(build_clip, model, report=bench.report))
    clip = bench.clips[argument]
    ready = teacher_of_clip(clip, source.class_names, source.template, bench.device, bench.report)
    identity = _identity(model)
    subject = teacher_subject(ready.teacher, ready.preprocessing, identity, argument, "baseline", bench.device)
    store = _store(bench, bench.data)
    limit = bench.data.unreadable_limit_percent
    records, _ = _score(subject, source, images, store, bench, "baseline", limit)
    if source.name in IMAGENET_FAMILY:
        vectors = encode_ensemble(clip, source.class_names, IMAGENET_TEMPLATES, bench.device, bench.report).cpu()
        ensemble = replace(subject, class_vectors=vectors)
        test = store.features(subject.encoder, images, f"scoring baseline on {source.name}")
        records.append(replace(zero_shot(ensemble, source, images, test).record, method="clip-ensemble"))
    return Results(records)


def _score(
    subject: Subject,
    source: Source,
    images: ImageSet,
    store: FeatureStore,
    bench: Bench,
    label: str,
    unreadable_limit_percent: float,
) -> tuple[list[Record], dict[int, int]]:
    """The records of each protocol, and the zero-shot answer to each image by its position."""
    bench.report(Stage(f"Scoring {label} {subject.model} on {len(images)} images of {source.name}"))
    test = store.features(subject.encoder, images, f"scoring {label} on {source.name}")
    if not len(test.indices):
        raise DataError(f"{source.name}: none of the {len(images)} images could be read")
    check_unreadable(test.unreadable, len(images), unreadable_limit_percent, f"images of {source.name}")
    if label != "teacher":  # the teacher meets the same files
        _report_unreadable(test, bench.report)
    scored = zero_shot(subject, source, images, test)
    records = [replace(scored.record, protocol=name) for name in _whole_protocols(source, bench.protocols)]
    if images.labels is not None:
        if "base-to-novel" in bench.protocols and source.name not in VARIANTS:
            records += base_to_novel(subject, source, images, test)
        if "few-shot" in bench.protocols and source.train.labels:
            records += few_shot(
                subject, source, images, test, store, bench.shots, bench.seeds, unreadable_limit_percent
            )
    answers = dict(zip(test.indices.tolist(), scored.predicted.tolist(), strict=True))
    return records, answers


def _fitting_protocols(record: StudentRecord, bench: Bench) -> Bench:
    """Without the protocols that a student does not fit: where its teacher learned from labels of the very data."""
    adapt = record.recipe.teacher.adapt
    if adapt.method == "none" or getattr(adapt, "data", None) is not None:
        return bench
    if "base-to-novel" in bench.protocols and getattr(adapt, "classes", "all") == "all":
        bench.report(
            Notice(f"{record.source}: the teacher learned from labels of all classes, so its `new` ones are not novel")
        )
    elsewhere = ("cross-dataset", "domain-generalization")
    return replace(bench, protocols=tuple(name for name in bench.protocols if name not in elsewhere))


def _whole_protocols(source: Source, protocols: Sequence[str]) -> list[str]:
    """Those of the protocols that score all classes of all test images of this data set at once."""
    applies = {
        "zero-shot": True,
        "cross-dataset": source.name in CATALOG and source.name not in IMAGENET_FAMILY,
        "domain-generalization": source.name in VARIANTS,
    }
    return [name for name in protocols if applies.get(name, False)]


def _on_common(first: dict[int, int], second: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Both models' answers to the images that both have answered."""
    common = sorted(first.keys() & second.keys())
    return np.array([first[index] for index in common]), np.array([second[index] for index in common])


def _store(bench: Bench, data: Data) -> FeatureStore:
    return FeatureStore(bench.features, bench.device, worker_count(data), bench.report)


def _report_unreadable(test: Features, report: Report) -> None:
    if test.unreadable:
        named = "".join(f"\n  {problem}" for problem in test.unreadable[:MOST_NAMED])
        count = len(test.unreadable)
        report(Notice(f"{count} {'image' if count == 1 else 'images'} can't be read, left out:{named}"))


def _parse_argument(argument: str) -> Model:
    if argument.startswith(SCHEMES):
        return Model(arch=argument)
    arch, colon, weights = argument.partition(":")
    if not colon or not weights:
        raise ModelError(f"{argument}: is neither a student.pt nor ARCH:WEIGHTS, such as ViT-B-32:laion2b_s34b_b79k")
    return Model(arch=arch, weights=weights)


def _identity(model: Model) -> str:
    """A digest of the weights that a model loads."""
    parts = [model.arch, model.config, model.weights, weights_sha256(model)]
    if isinstance(model, Teacher) and model.format != "clip":
        parts.append(model.format)
    return sha256_of_data(parts)


def _scored_images(source: Source, report: Report) -> ImageSet:
    if source.test is not None and len(source.test):
        if source.test.labels is None:
            report(Notice(f"the test images of {source.name} have no labels: only agreement can be measured"))
        return source.test
    report(Notice(f"{source.name} has no test images: agreement is measured on the training images, without labels"))
    if len(source.train) <= MOST_FOR_AGREEMENT:
        return replace(source.train, labels=None)
    chosen = list(source.train.spaced(MOST_FOR_AGREEMENT))
    report(Notice(f"of {len(source.train):,} images {len(chosen):,} are taken, evenly spaced"))
    return replace(source.train.subset(chosen), labels=None)


def _teacher_of(path: Path, student: Student, record: StudentRecord, bench: Bench) -> Subject:
    """The teacher that a student learned from. Raises CheckpointError or ModelError where it is not to be found."""
    # With the prompts that the student learned from, whatever the data at hand would prompt.
    ready = teacher_of_student(path, student, record, bench.device, bench.allow_download, bench.report)
    if ready.checkpoint is not None:
        name, identity = str(ready.checkpoint), sha256_of_file(ready.checkpoint)
    else:
        settings = record.recipe.teacher
        name = ":".join(part for part in (settings.arch or "inline model", settings.weights) if part)
        identity = _identity(settings)
    return teacher_subject(ready.teacher, ready.preprocessing, identity, name, "teacher", bench.device)
