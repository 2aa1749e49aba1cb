"""Scores of students, of their teachers, and of plain CLIP models; nothing is trained on test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from comkd_cli import processes
from comkd_cli.backbones import IMAGENET_TEMPLATES, Clip, build_clip, weights_sha256
from comkd_cli.catalog import CATALOG
from comkd_cli.checkpoints import StudentRecord, load_student
from comkd_cli.data.loaders import worker_count
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.sources import open_source
from comkd_cli.data.unreadable import check_unreadable
from comkd_cli.devices import failures_explained
from comkd_cli.errors import CheckpointError, ComkdError, DataError, MisuseError, ModelError
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.evaluation.features import Features, FeatureStore
from comkd_cli.evaluation.metrics import agreement_percent
from comkd_cli.evaluation.protocols import STANDARD_SEEDS, STANDARD_SHOTS, base_to_novel, few_shot, zero_shot
from comkd_cli.evaluation.subjects import Subject, student_subject, teacher_subject
from comkd_cli.files import sha256_of_data, sha256_of_file
from comkd_cli.method.student import Student
from comkd_cli.progress import Notice, Report, Stage, once
from comkd_cli.recipe.model import SCHEMES, Data, Model, Teacher
from comkd_cli.results import Missing, Record, Results
from comkd_cli.teachers import encode_ensemble, teacher_of_clip, teacher_of_student

IMAGENET_FAMILY = tuple(name for name, dataset in CATALOG.items() if dataset.layout.startswith("imagenet"))
VARIANTS = tuple(name for name, dataset in CATALOG.items() if dataset.layout == "imagenet-variant")
MOST_NAMED = 10
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
    shots: tuple[int, ...] = STANDARD_SHOTS
    seeds: tuple[int, ...] = STANDARD_SEEDS
    allow_download: bool = False
    """Fetch what a student.pt names and this machine lacks."""
    clips: dict[str, Clip] = field(default_factory=dict)
    """Plain CLIPs that were loaded, by argument: one serves every data set."""
    told: set[str] = field(default_factory=set)
    """What was said of the data already: several students open the same."""

    def open_source(self, data: Data) -> Source:
        """The images and classes of some data, the same in every process; each notice of them is said once."""
        return processes.agreed(partial(open_source, data, self.data_root, self.runs, once(self.report, self.told)))


def evaluate(model: str | None, runs: Path, bench: Bench) -> Results:
    """The scores of a student.pt, of ARCH:WEIGHTS, or with None of each data set's newest students.

    With several data sets, one that is missing is a row that says what to do. Raises the error of what was
    asked for where nothing at all could be scored.
    """
    jobs = _jobs(model, runs, replace(bench, runs=runs))
    records: list[Record] = []
    missing: list[Missing] = []
    problems: list[ComkdError] = []
    for dataset, job in jobs:
        try:
            with failures_explained():
                records += job()
        except (DataError, CheckpointError) as error:
            problems.append(error)
            missing.append(Missing(dataset, str(error)))
    if not records and not problems:
        asked = ", ".join(bench.protocols)
        raise DataError(f"nothing to score: {asked} does not apply to the models and data sets that were given")
    if not records:
        raise problems[0] if len(problems) == 1 else DataError("\n".join(str(problem) for problem in problems))
    return Results(records, missing)


def home_of(model: str | None, runs: Path, own_data: bool) -> Path:
    """Where results.json goes if nobody says: beside a student scored on its own data, else into `runs`."""
    beside = model is not None and own_data and Path(model).is_file()
    return Path(str(model)).parent if beside else runs


def newest_students(runs: Path) -> dict[str, list[Path]]:
    """For each data set, by name, the students of every seed of the recipe that was finished last on it."""
    found = sorted(runs.glob("*/*/seed*/student.pt"), key=lambda path: path.stat().st_mtime)
    newest = {path.parent.parent.name: path.parent.parent for path in found}
    return {name: sorted(folder.glob("seed*/student.pt")) for name, folder in newest.items()}


Job = tuple[str, Callable[[], list[Record]]]


def _jobs(model: str | None, runs: Path, bench: Bench) -> list[Job]:
    """What to score, a data set's name and the work each."""
    if model is None:
        return _student_jobs(runs, bench)
    if Path(model).exists() or (model.endswith(".pt") and ":" not in model):
        return [("", partial(_score_student, Path(model), bench))]
    if bench.datasets:
        own = {name: replace(bench, data=Data(dataset=name)) for name in bench.datasets}
        return [(name, partial(_score_baseline, model, own_bench)) for name, own_bench in own.items()]
    return [("", partial(_score_baseline, model, bench))]


def _student_jobs(runs: Path, bench: Bench) -> list[Job]:
    students = newest_students(runs)
    if not bench.datasets:
        if not students:
            raise DataError(f"{runs}: holds no finished student; make one with `comkd distill digits`")
        return [(name, partial(_score_student, path, bench)) for name, seeds in students.items() for path in seeds]

    def absent(name: str) -> list[Record]:
        raise DataError(f"{name}: no student below {runs}; make one with `comkd distill RECIPE --dataset {name}`")

    jobs: list[Job] = []
    for name in bench.datasets:
        jobs += [(name, partial(_score_student, path, bench)) for path in students.get(name, [])]
        if name not in students:
            jobs.append((name, partial(absent, name)))
    return jobs


def _score_student(path: Path, bench: Bench) -> list[Record]:
    """A student and its teacher on the test images of its data, or of the bench's.

    Where there are no test images, or none with labels, what is left is how often the two agree. A teacher
    that can't be found is a notice, and the student is scored alone.
    """
    student, record = load_student(path, bench.allow_download)
    data = bench.data or record.recipe.data
    source = bench.open_source(data)
    check_classes(record, source)
    bench = _fitting_protocols(record, bench)
    subject = student_subject(student, record, sha256_of_file(path), str(path), bench.device)
    images = _scored_images(source, bench.report)
    store = _store(bench, data)
    limit = data.unreadable_limit_percent
    records, predicted = _score(subject, source, images, store, bench, "student", limit)
    teacher = _teacher_of(path, student, record, bench)
    if teacher is None:
        return records
    taught, teacher_predicted = _score(teacher, source, images, store, bench, "teacher", limit)
    agreement = agreement_percent(*_on_common(predicted, teacher_predicted))
    whole = [replace(entry, agreement_percent=agreement) if entry.classes == "all" else entry for entry in records]
    return [*whole, *taught]


def _score_baseline(argument: str, bench: Bench) -> list[Record]:
    """A plain CLIP, given as ARCH:WEIGHTS, on the test images of the bench's data."""
    if bench.data is None:
        raise MisuseError(f"{argument}: say on what to score it, with --dataset, --folder or --all")
    model = _parse_argument(argument)
    source = bench.open_source(bench.data)
    images = _scored_images(source, bench.report)
    if argument not in bench.clips:
        bench.clips[argument] = build_clip(model, report=bench.report)
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
    return records


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
            records += few_shot(subject, source, images, test, store, bench.shots, bench.seeds)
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


def _teacher_of(path: Path, student: Student, record: StudentRecord, bench: Bench) -> Subject | None:
    try:
        # With the prompts that the student learned from, whatever the data at hand would prompt.
        ready = teacher_of_student(path, student, record, bench.device, bench.allow_download, bench.report)
        if ready.checkpoint is not None:
            name, identity = str(ready.checkpoint), sha256_of_file(ready.checkpoint)
        else:
            settings = record.recipe.teacher
            name = ":".join(part for part in (settings.arch or "inline model", settings.weights) if part)
            identity = _identity(settings)
    except (CheckpointError, ModelError) as error:
        bench.report(Notice(f"the teacher can't be scored beside the student: {error}"))
        return None
    return teacher_subject(ready.teacher, ready.preprocessing, identity, name, "teacher", bench.device)
