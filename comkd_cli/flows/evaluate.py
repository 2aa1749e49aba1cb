"""Scores of students, of their teachers, and of plain CLIP models; nothing is trained on test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from comkd_cli.data.loaders import worker_count
from comkd_cli.data.prompts import Prompts
from comkd_cli.data.source import Source
from comkd_cli.data.sources import open_source, reopen_source
from comkd_cli.errors import CheckpointError, ComkdError, DataError, MisuseError, ModelError
from comkd_cli.evaluation.answers import Observation
from comkd_cli.evaluation.classes import check_classes
from comkd_cli.evaluation.features import Encoder, FeatureStore
from comkd_cli.evaluation.few_shot import STANDARD_SEEDS, STANDARD_SHOTS, Draws
from comkd_cli.evaluation.protocols import zero_shot
from comkd_cli.evaluation.scoring import IMAGENET_FAMILY, DatasetScorer, agreement_of, images_to_score
from comkd_cli.evaluation.subjects import Subject, student_subject, teacher_subject
from comkd_cli.events import Notice, Report, once
from comkd_cli.files import sha256_of_file
from comkd_cli.method.student import Student
from comkd_cli.models.architectures import named_model
from comkd_cli.models.backbones import IMAGENET_TEMPLATES, Clip, build_clip
from comkd_cli.models.checkpoints import StudentRecord, load_student
from comkd_cli.models.finished import is_student, newest_students
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.catalog import CATALOG
from comkd_cli.recipe.identity import Identity, described, recipe_settings
from comkd_cli.recipe.model import Data
from comkd_cli.results.records import Missing, Results, merged
from comkd_cli.results.tables import ONE_ANSWER_PERCENT
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.devices import failures_explained
from comkd_cli.teachers.class_vectors import encode_ensemble
from comkd_cli.teachers.loading import teacher_of_clip
from comkd_cli.teachers.of_student import teacher_of_student
from comkd_cli.teachers.subjects import scored_teacher, weights_digest

IMAGENET = Prompts(IMAGENET_TEMPLATES)
MEMORY_REMEDY = "close other programs, or use a machine with more memory"


@dataclass(frozen=True)
class Bench:
    """The settings of an evaluation, and what its models share: loaded CLIPs, and recipes of students."""

    device: torch.device
    data_root: Path
    report: Report
    runs: Path = Path("runs")
    """Folder of all runs, which holds the index of shards."""
    features: Path | None = None
    """Folder to store features in; None stores none."""
    data: Data | None = None
    """Instead of the data that a student was trained on."""
    datasets: tuple[str, ...] = ()
    """Several datasets, by name; each that could not be scored is a separate row."""
    protocols: tuple[str, ...] = ("zero-shot",)
    protocols_named: bool = False
    """Whether the user chose the protocols; then one that does not apply to a dataset is a notice."""
    shots: tuple[int, ...] = STANDARD_SHOTS
    seeds: tuple[int, ...] = STANDARD_SEEDS
    allow_download: bool = False
    """Download files that a student.pt refers to and no cache has."""
    on_scored: Callable[[Observation], None] = lambda seen: None
    """Called with each model that was scored, and its answers."""
    clips: dict[str, Clip] = field(default_factory=dict)
    """Loaded plain CLIPs by argument, each used for every dataset."""
    students: dict[Path, tuple[Student, StudentRecord]] = field(default_factory=dict)
    """Students that were loaded to be encoded beside another, until they are scored."""
    recipes: dict[Path, tuple[Path, Recipe]] = field(default_factory=dict)
    """The first scored student and its recipe, by the folder of its seeds."""

    def open_source(self, data: Data) -> Source:
        """The images and classes of a dataset, the same in every process."""
        return collectives.in_turn(partial(open_source, data, self.data_root, self.runs, self.report))

    def reopen_source(self, data: Data, record: StudentRecord) -> Source:
        """As `open_source`, without any image among the held-out ones that the student was trained on."""
        reopen = partial(reopen_source, data, record.holdout, self.data_root, self.runs, self.report)
        return collectives.in_turn(reopen)

    def scorer(self, source: Source, data: Data) -> DatasetScorer:
        """Scores models on the test images of a source, which was opened from `data`."""
        return DatasetScorer(
            source,
            images_to_score(source, self.report),
            FeatureStore(self.features, self.device, worker_count(data), self.report),
            self.protocols,
            Draws(self.shots, self.seeds),
            data.unreadable_limit_percent,
            self.on_scored,
        )


@dataclass(frozen=True)
class Job:
    """One model to score on one dataset."""

    work: Callable[[], Results]
    dataset: str = ""
    """Its name, if there are several."""
    model: str | None = None
    """None if no student was found."""
    absent: bool = False
    """Whether the dataset or its student does not exist, so that the work will fail."""


def evaluate(
    model: str | None, runs: Path, bench: Bench, keep: Callable[[Results], None] = lambda results: None
) -> Results:
    """The scores of a student.pt, of ARCH:WEIGHTS, or with None of the newest students of each dataset.

    Of several models or datasets, one that could not be scored is a row with the reason. keep: called with the new
    results after each model and dataset, so that a process that is killed loses none of them. Raises the error of the
    model or dataset if nothing could be scored.
    """
    bench = replace(bench, runs=runs, report=once(bench.report, set()))  # models on one dataset cause the same notices
    results = Results([])
    problems: list[Exception] = []
    for job in _jobs(model, runs, bench):
        try:
            with failures_explained(MEMORY_REMEDY):
                found = job.work()
        except _recoverable() as error:
            problems.append(error)
            entry = Missing(job.dataset, _message(error), job.model, failed=not job.absent)
            results = merged(results, Results([], [entry]))
            continue
        if found.records:
            keep(found)
        results = merged(results, found)
        _report_inapplicable(job, found, bench)
    if not results.records and not problems:
        protocols = ", ".join(bench.protocols)
        raise DataError(f"nothing to score: {protocols} does not apply to the given models and datasets")
    if not results.records:
        raise problems[0] if len(problems) == 1 else DataError("\n".join(entry.line for entry in results.missing))
    if results.missing:
        keep(Results([], results.missing))
    return results


def home_of(model: str | None, runs: Path, own_data: bool) -> Path:
    """The default folder of results.json: that of a student that is scored on its own data, else `runs`."""
    if model is not None and own_data and Path(model).is_file():
        return Path(model).parent
    return runs


def _recoverable() -> tuple[type[Exception], ...]:
    """The errors of one model on one dataset after which the others can still be scored.

    With several processes only those that all of them raise: one that failed alone would leave the others waiting.
    """
    alone = ranks.world_size() == 1
    return (ComkdError, OSError) if alone else (DataError, CheckpointError, ModelError)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _report_inapplicable(job: Job, found: Results, bench: Bench) -> None:
    """Report the protocols that the user chose and that produced no record."""
    lacking = [name for name in bench.protocols if name not in {record.protocol for record in found.records}]
    if bench.protocols_named and lacking:
        on = " on ".join(filter(None, (job.model, job.dataset)))
        bench.report(Notice(f"{on}: {', '.join(lacking)} does not apply and was skipped"))


def _jobs(model: str | None, runs: Path, bench: Bench) -> list[Job]:
    """The pairs of model and dataset to score."""
    if model is None:
        return _student_jobs(runs, bench)
    scored = partial(_score_student, Path(model)) if is_student(model) else partial(_score_baseline, model)
    score: Callable[[Bench], Results] = scored
    if not bench.datasets:
        return [Job(partial(score, bench), model=model)]
    own = {name: replace(bench, data=Data(dataset=name)) for name in bench.datasets}
    return [Job(partial(score, own[name]), name, model, _data_is_absent(name, bench)) for name in bench.datasets]


def _student_jobs(runs: Path, bench: Bench) -> list[Job]:
    students = newest_students(runs)
    if not bench.datasets:
        if not students:
            raise DataError("holds no finished student", path=runs, remedy="train one with `comkd distill digits`")
        return [
            Job(partial(_score_student, path, bench, seeds[position:]), name, str(path))
            for name, seeds in students.items()
            for position, path in enumerate(seeds, 1)
        ]

    def no_student(name: str) -> Results:
        remedy = f"train one with `comkd distill RECIPE --dataset {name}`"
        raise DataError(f"holds no student of {name}", path=runs, remedy=remedy)

    jobs: list[Job] = []
    for name in bench.datasets:
        absent = _data_is_absent(name, bench)
        seeds = students.get(name, [])
        jobs += [
            Job(partial(_score_student, path, bench, seeds[position:]), name, str(path), absent)
            for position, path in enumerate(seeds, 1)
        ]
        if name not in students:
            jobs.append(Job(partial(no_student, name), name, absent=True))
    return jobs


def _data_is_absent(name: str, bench: Bench) -> bool:
    return name in CATALOG and not (bench.data_root / CATALOG[name].folder).is_dir()


def _score_student(path: Path, bench: Bench, others: Sequence[Path] = ()) -> Results:
    """A student and its teacher on the test images of its data, or of the bench's.

    Without test images, or without labels, only the agreement of the two is measured. If the teacher could not be
    loaded, that is a notice, and the student is scored alone. others: students that are scored next; images that they
    share are decoded once.
    """
    student, record = _student(path, bench)
    _report_other_settings(path, record, bench)
    own = record.recipe.data
    data = bench.data.model_copy(update={"images": own.images}) if bench.data else own  # read as in its training
    source = bench.reopen_source(data, record)
    check_classes(record, source, bench.report)
    scorer = _without_unfit_protocols(record, bench).scorer(source, data)
    subject = _subject_of(path, student, record, bench)
    teacher, beside = None, _encoders_beside(others, record, bench)
    try:
        teacher = collectives.on_every_rank(partial(_teacher_of, path, student, record, bench))
        beside.append(teacher.encoder)
    except (ComkdError, OSError) as error:
        bench.report(Notice(f"the teacher could not be scored with the student: {_message(error)}"))
    scorer = scorer.beside(beside)
    scores = scorer.score(_among_classes_of(source, subject))
    if teacher is None:
        return Results(scores.records)
    try:
        with failures_explained(MEMORY_REMEDY):
            teacher_scores = scorer.score(_among_classes_of(source, teacher))
    except _recoverable() as error:  # the student's scores are kept
        return Results(scores.records, [Missing(source.name, _message(error), teacher.model, failed=True)])
    agreement = agreement_of(scores, teacher_scores)
    name = source.class_names[agreement.top_answer]
    if agreement.top_answer_percent >= ONE_ANSWER_PERCENT:
        share = f"{agreement.top_answer_percent:.0f} % of its answers on these images are {name!r}"
        bench.report(Notice(f"{teacher.model}: {share}, so agreement with it says little"))
    records = agreement.added_to(scores.records, name)
    return Results([*records, *teacher_scores.records])


def _student(path: Path, bench: Bench) -> tuple[Student, StudentRecord]:
    if path in bench.students:
        return bench.students.pop(path)
    return collectives.on_every_rank(partial(load_student, path, bench.allow_download))


def _subject_of(path: Path, student: Student, record: StudentRecord, bench: Bench) -> Subject:
    return student_subject(student, record, sha256_of_file(path), str(path), bench.device)


def _encoders_beside(paths: Sequence[Path], record: StudentRecord, bench: Bench) -> list[Encoder]:
    """The encoders of other students that are scored on the same images as the one of a record."""
    encoders = []
    for path in paths:
        try:
            student, other = _student(path, bench)
        except (ComkdError, OSError):  # reported when it is scored
            continue
        bench.students[path] = student, other
        if (bench.data or other.recipe.data, other.holdout) == (bench.data or record.recipe.data, record.holdout):
            encoders.append(_subject_of(path, student, other, bench).encoder)
    return encoders


def _among_classes_of(source: Source, subject: Subject) -> Subject:
    """The subject with only the classes of the data, since those that were added to a student come after them."""
    return replace(subject, class_vectors=subject.class_vectors[: len(source.class_names)])


def _report_other_settings(path: Path, record: StudentRecord, bench: Bench) -> None:
    """Report seeds of one folder that were trained with different recipes, since tables average them."""
    first, recipe = bench.recipes.setdefault(path.parent.parent, (path, record.recipe))
    same_seed = record.recipe.model_copy(update={"seed": recipe.seed})
    own, others = ({"recipe": recipe_settings(settings)} for settings in (same_seed, recipe))
    if differing := Identity(own).differences(others, "that run"):
        bench.report(
            Notice(
                f"{path}: was trained with different settings from {first} ({described(differing)}), but tables "
                "average both as seeds of one recipe; distil one of them again with --fresh"
            )
        )


def _score_baseline(argument: str, bench: Bench) -> Results:
    """A plain CLIP, given as ARCH:WEIGHTS, on the test images of the bench's data."""
    if bench.data is None:
        raise MisuseError(f"{argument}: needs a dataset to be scored on", remedy="add --dataset, --folder or --all")
    model = named_model(argument)
    source = bench.open_source(bench.data)
    scorer = bench.scorer(source, bench.data)
    if argument not in bench.clips:
        bench.clips[argument] = collectives.on_every_rank(partial(build_clip, model, report=bench.report))
    clip = bench.clips[argument]
    ready = teacher_of_clip(clip, source.class_names, source.wording, bench.device, bench.report)
    identity = weights_digest(model)
    subject = teacher_subject(ready.teacher, ready.preprocessing, identity, argument, "baseline", bench.device)
    records = scorer.score(subject).records
    if source.name in IMAGENET_FAMILY:
        vectors = encode_ensemble(clip, source.class_names, IMAGENET, bench.device, bench.report).cpu()
        ensemble = replace(subject, class_vectors=vectors)
        records.append(replace(zero_shot(scorer.evaluation(ensemble)).record, method="clip-ensemble"))
    return Results(records)


def _without_unfit_protocols(record: StudentRecord, bench: Bench) -> Bench:
    """Drop the protocols for other datasets if the student's teacher was trained on labels of this one."""
    adapt = record.recipe.teacher.adapt
    if adapt.method == "none" or getattr(adapt, "data", None) is not None:
        return bench
    if "base-to-novel" in bench.protocols and getattr(adapt, "classes", "all") == "all":
        bench.report(
            Notice(f"{record.source}: the teacher was trained on labels of all classes, so `new` ones are not novel")
        )
    elsewhere = ("cross-dataset", "domain-generalization")
    return replace(bench, protocols=tuple(name for name in bench.protocols if name not in elsewhere))


def _teacher_of(path: Path, student: Student, record: StudentRecord, bench: Bench) -> Subject:
    """The teacher that a student was trained with. Raises CheckpointError or ModelError if it could not be loaded."""
    # With the prompts of the student's training, not with the template of the bench's data.
    ready = teacher_of_student(path, student, record, bench.device, bench.allow_download, bench.report)
    return scored_teacher(ready, record.recipe.teacher, bench.device)
