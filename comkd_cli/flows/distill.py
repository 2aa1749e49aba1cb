"""Stage 2: a student learns from a frozen teacher, without labels unless the recipe asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from comkd_cli.data.loaders import Batch, Crops, Steps, TrainingLoader, check_shares, worker_count
from comkd_cli.data.source import Source
from comkd_cli.data.transforms import stable_seed
from comkd_cli.errors import CheckpointError, DataError, MisuseError
from comkd_cli.evaluation.subjects import live_student
from comkd_cli.evaluation.zero_shot import SELECTION_SCORE, Scorer
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.files import remove_folder, sha256_of_data, sha256_of_file, write_text
from comkd_cli.method.objective import NO_LABELS, gradient_shares, loss_terms
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import (
    ImageTower,
    build_image_tower,
    outline_clip,
    outline_image_tower,
    recompute_activations,
    state_sha256,
    weights_sha256,
)
from comkd_cli.models.checkpoints import StudentRecord, load_student_record, save_student
from comkd_cli.models.costs import multiply_adds, parameters
from comkd_cli.recipe import Recipe, to_yaml
from comkd_cli.recipe.identity import Identity, described, recipe_settings
from comkd_cli.recipe.model import PromptSrcAdapt
from comkd_cli.results.result_files import forget_model
from comkd_cli.results.tables import VARIANTS
from comkd_cli.runtime import collectives, ranks
from comkd_cli.teachers.cached import CachedTeacher, fill_cache
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache
from comkd_cli.teachers.loading import ReadyTeacher, prompted_clip
from comkd_cli.training.loop import StepResult, Task, delete_checkpoint, fit, has_checkpoint, kept_figures

IDLE_GATE = 0.01  # below this EduAttention adds less than a hundredth of a unit vector to a feature


@dataclass(frozen=True)
class Run:
    """One distillation: what, from what data, and where its files go."""

    recipe: Recipe
    name: str
    """Of the recipe, and of the folder of its runs."""
    source: Source
    runs: Path
    teacher: Mapping[str, Any]
    """Named digests of what the teacher is made from, beside its settings in the recipe."""
    teacher_key: str = ""
    """Of the teacher alone; students of other classes can share what is kept of its image features."""

    @property
    def folder(self) -> Path:
        """runs/<recipe>/<dataset>/seed<k>."""
        return self.runs / self.name / self.source.name / f"seed{self.recipe.seed}"

    @property
    def student_file(self) -> Path:
        """Where the finished student is."""
        return self.folder / "student.pt"

    @cached_property
    def identity(self) -> Identity:
        """All that decides the student. Reads the images' contents where they are not remembered."""
        recipe, test = self.recipe, self.source.test
        student = {"weights_sha256": weights_sha256(recipe.student)}
        data: dict[str, Any] = {"fingerprint": recipe.data.fingerprint, **self.source.identity()}
        if recipe.selection == "promptkd" and test is not None:
            labels = None if test.labels is None else sha256_of_data(list(test.labels))
            data |= {
                "test_images": test.digest,
                "test_labels": labels,
                # It depends on whether teacher.adapt.data is the recipe's own data, which no setting that counts says.
                "selection_classes": selection_classes(recipe),
            }
        parts = {"recipe": recipe_settings(recipe), "data": data, "student": student, "teacher": dict(self.teacher)}
        return Identity(parts)


@dataclass(frozen=True)
class Outline:
    """What the models of a recipe cost, whether or not their weights and the images are at hand."""

    classes: int
    teacher_parameters: int
    teacher_image_tower_parameters: int
    teacher_multiply_adds: int
    """Of its image tower for one image."""
    teacher_dim: int
    """Of its features."""
    student_image_tower_parameters: int
    student_trainable_parameters: int
    student_multiply_adds: int


@dataclass(frozen=True)
class Plan:
    """What a run would do, for --dry-run."""

    folder: Path
    training_images: int
    test_images: int
    steps_per_epoch: int
    state: str
    """What is there of the run already."""


def finished(run: Run, report: Report = lambda event: None) -> bool:
    """Whether the run's student exists. Raises CheckpointError, naming what differs, where it is another run's."""
    if not collectives.broadcast(run.student_file.exists()):
        return False
    record = load_student_record(run.student_file)
    if differences := run.identity.differences(record.identity_parts or _parts_of_old(record), "the finished run"):
        raise CheckpointError(
            f"{run.student_file}: was made from other settings or images: {described(differences)}; replace it with "
            "--fresh, or keep both with another --runs folder"
        )
    if record.identity_parts is None:
        report(
            Notice(
                f"{run.student_file}: was made by a version of comkd that did not record image contents: the settings "
                "are the same, the images and the teacher were not compared; --fresh repeats the run"
            )
        )
    return True


def _parts_of_old(record: StudentRecord) -> dict[str, Any]:
    """What a student.pt says of its run that has no record of it: settings, class names and prompt."""
    names = {"class_names": list(record.class_names), "template": record.template}
    return {"recipe": recipe_settings(record.recipe), "data": names}


def outline(recipe: Recipe, classes: int) -> Outline:
    """What the recipe's models cost; they are built without weights, so nothing is fetched. Raises ModelError."""
    clip = outline_clip(recipe.teacher)
    adapt = recipe.teacher.adapt
    tokens = clip.tokenize(["a photo of a thing."]).to("meta")
    dim = int(clip.model.encode_text(tokens).shape[-1])  # type: ignore[operator]
    with torch.device("meta"):
        if isinstance(adapt, PromptSrcAdapt):
            prompted_clip(clip, adapt.vision_depth, adapt.text_depth, adapt.tokens)
        tower = outline_image_tower(recipe.student)
        student = _build_student(recipe, tower, torch.zeros(classes, dim), torch.ones(()))
    teacher_tower: nn.Module = clip.model.visual  # type: ignore[assignment]
    return Outline(
        classes=classes,
        teacher_parameters=parameters(clip.model),
        teacher_image_tower_parameters=parameters(teacher_tower),
        teacher_multiply_adds=multiply_adds(teacher_tower, clip.preprocessing.size),
        teacher_dim=dim,
        student_image_tower_parameters=parameters(student),
        student_trainable_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        student_multiply_adds=multiply_adds(student, tower.preprocessing.size),
    )


def plan(run: Run) -> Plan:
    """What the run would do; nothing is loaded or written. Raises DataError or TrainingError."""
    _check_images(run)
    batch_size = min(run.recipe.optim.batch_size, len(run.source.train))
    check_shares(batch_size, run.recipe.optim.accumulation_steps)
    return Plan(
        folder=run.folder,
        training_images=len(run.source.train),
        test_images=len(run.source.test) if run.source.test else 0,
        steps_per_epoch=len(run.source.train) // batch_size,
        state=_state_of(run),
    )


def _state_of(run: Run) -> str:
    try:
        if finished(run):
            return "finished; --fresh repeats it"
        return "will resume from a checkpoint" if has_checkpoint(run.folder, run.identity) else "new"
    except CheckpointError as error:  # of another run: the plan is told all the same
        return f"refused: {error}"


def distill(
    run: Run,
    make_teacher: Callable[[], ReadyTeacher],
    accelerator: Accelerator,
    report: Report,
    resume_line: str,
    fresh: bool = False,
) -> Path:
    """Train the run's student, going on from where it was stopped, and return its student.pt.

    make_teacher: called once, when the student is about to be trained. fresh: forget what there is of
    this run. Raises DataError, ModelError, TrainingError, CheckpointError or Interrupted.
    """
    recipe, source = run.recipe, run.source
    _check_images(run)
    _check_selection(run)
    if not fresh:
        has_checkpoint(run.folder, run.identity)
    # What can be refused is refused before hours go into a teacher.
    check_shares(min(recipe.optim.batch_size, len(source.train)), recipe.optim.accumulation_steps)
    seed = stable_seed("backbone", recipe.seed)
    tower = collectives.on_every_rank(lambda: build_image_tower(recipe.student, seed, report=report))
    if recipe.checkpointing:
        recompute_activations(tower.module)
    ready = make_teacher()
    if fresh:
        delete_checkpoint(run.folder)
        if ranks.is_main():
            run.student_file.unlink(missing_ok=True)
        collectives.barrier()
    teacher = ready.teacher.to(accelerator.device)
    backbone_sha256 = state_sha256(tower.module) if recipe.student.train == "prompts" else None
    student = _build_student(recipe, tower, teacher.class_vectors, teacher.logit_scale).to(accelerator.device)
    if recipe.compile:
        # The towers alone: the rest is small, and gradients are looked at between it and the tower.
        student.backbone.compile()
        teacher.image_tower.compile()
    labels = "and their labels" if recipe.loss.labels else "no labels"
    report(Stage(f"Student: {_size(student)} parameters learn from {len(source.train)} images, {labels}"))
    workers = worker_count(recipe.data)
    if ranks.is_main():
        write_text(run.folder / "recipe.yaml", to_yaml(recipe))

    scorer = Scorer(source, accelerator.device, workers, report, recipe.data.unreadable_limit_percent)

    def score() -> dict[str, float]:
        with _uncompiled(recipe):
            return scorer(live_student(student, tower.preprocessing, accelerator.device), selection_classes(recipe))

    asked = CachedTeacher(teacher, _open_cache(run, ready, report) if recipe.loss.needs_teacher else None)
    settings = recipe.teacher_cache
    task = Task(
        model=student,
        loss=lambda model, batch, probe: _distillation_loss(model, batch, probe, asked, recipe, student),
        loader=TrainingLoader(
            source.train,
            [ready.preprocessing, tower.preprocessing],
            Crops(recipe.augment, settings.seed, settings.views) if settings else Crops(recipe.augment, recipe.seed),
            Steps(recipe.optim.batch_size, recipe.seed, recipe.optim.accumulation_steps),
            workers,
            is_cached=_known(recipe, asked),
        ),
        optim=recipe.optim,
        folder=run.folder,
        identity=run.identity,
        seed=stable_seed("student training", recipe.seed),
        label="student",
        resume_line=resume_line,
        unreadable_limit_percent=recipe.data.unreadable_limit_percent,
        rate_factors=_rate_factors(recipe),
        evaluate=score,
        evaluate_every_epochs=recipe.evaluate_every_epochs,
        select_by=SELECTION_SCORE if selection_classes(recipe) else None,
        keep=asked.keep,
        # EduAttention acts on the logits alone.
        uses_all_parameters=recipe.loss.edu_attention is None or recipe.loss.uses_logits,
    )
    history = fit(task, accelerator, report)
    asked.tell(report)
    _report_idle_gate(recipe, student, report)
    record = StudentRecord(
        recipe=recipe,
        recipe_name=run.name,
        source=source.name,
        class_names=source.class_names,
        template=source.template,
        preprocessing=tower.preprocessing,
        backbone=tower.origin,
        backbone_sha256=backbone_sha256,
        teacher=os.path.relpath(ready.checkpoint, run.folder) if ready.checkpoint else None,
        identity=run.identity.digest,
        identity_parts=dict(run.identity.parts),
        metrics=kept_figures(task, history),
        teacher_sha256=dict(ready.sha256),
    )
    with collectives.without_timeout():  # disks can be slow
        if ranks.is_main():
            _remove_what_was_made_of_an_older_student(run.folder)
            save_student(run.student_file, student, record)
            forget_model(run.runs, str(run.student_file), report)
    delete_checkpoint(run.folder)
    collectives.barrier()
    return run.student_file


def selection_classes(recipe: Recipe) -> Literal["all", "base"] | None:
    """Whose test images the kept epoch is chosen on; None keeps the last epoch.

    PromptKD's validation split is its test split: that of the base classes where the teacher learned from these alone
    (base-to-novel), that of all classes where it learned from another dataset (cross-dataset, domain generalisation).
    """
    if recipe.selection == "last":
        return None
    if recipe.selection_classes is not None:
        return recipe.selection_classes
    adapt = recipe.teacher.adapt
    if not isinstance(adapt, PromptSrcAdapt) or adapt.classes == "all" or recipe.data.dataset in VARIANTS:
        return "all"
    own, taught = recipe.data, adapt.data or recipe.data
    # Where the images are, not how they are decoded.
    same = (own.dataset, own.folder, own.shards) == (taught.dataset, taught.folder, taught.shards)
    return "base" if same else "all"


def _check_selection(run: Run) -> None:
    """Refuse to select an epoch on test images that have no labels, before anything is trained."""
    test = run.source.test
    if selection_classes(run.recipe) and (test is None or not test.labels):
        raise DataError(f"{run.source.name}: selection: promptkd needs labelled test images; use selection: last")


def _uncompiled(recipe: Recipe) -> AbstractContextManager[object]:
    """Within it compiled towers run as they are, as when the finished student is evaluated."""
    return torch.compiler.set_stance("force_eager") if recipe.compile else nullcontext()


def _remove_what_was_made_of_an_older_student(folder: Path) -> None:
    for name in ("results.json", "results.csv", "results.md", "results.tex"):
        (folder / name).unlink(missing_ok=True)
    remove_folder(folder / "bundle")


def _check_images(run: Run) -> None:
    if len(run.source.train) < 2:
        raise DataError(f"{run.source.name}: has {len(run.source.train)} training images; distillation needs more")
    if run.recipe.loss.labels is not None and run.source.train.labels is None:
        raise DataError(f"{run.source.name}: {NO_LABELS}")


def _build_student(
    recipe: Recipe, tower: ImageTower, class_vectors: torch.Tensor, logit_scale: torch.Tensor
) -> Student:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_seed("student", recipe.seed))
        return Student(tower.module, tower.width, class_vectors, logit_scale, recipe.student, recipe.loss.edu_attention)


def precompute(run: Run, make_teacher: Callable[[], ReadyTeacher], accelerator: Accelerator, report: Report) -> None:
    """Fill the run's teacher cache with every crop that is not there yet; a student is not trained.

    Raises MisuseError for a recipe without a cache, and what `distill` raises of teachers and images.
    """
    recipe = run.recipe
    if recipe.teacher_cache is None:
        raise MisuseError("--precompute fills the teacher cache, and the recipe has none; set teacher_cache.views")
    _check_images(run)
    ready = make_teacher()
    cache = _open_cache(run, ready, report)
    assert cache is not None  # since the recipe has settings for it
    ready.teacher.to(accelerator.device)
    fill_cache(cache, ready, run.source.train, recipe, accelerator, report)


def _open_cache(run: Run, ready: ReadyTeacher, report: Report) -> TeacherCache | None:
    settings = run.recipe.teacher_cache
    if settings is None:
        return None
    images = run.source.train
    made_of: dict[str, Any] = {
        "teacher": run.teacher_key,
        "preprocessing": asdict(ready.preprocessing),
        "images": images.digest,
        "augment": run.recipe.augment.model_dump(mode="json"),
        "precision": run.recipe.precision,
        "teacher_cache": settings.model_dump(mode="json"),
        # The same settings need not train the same teacher again.
        "checkpoint_sha256": sha256_of_file(ready.checkpoint) if ready.checkpoint else None,
    }
    dim = ready.teacher.class_vectors.shape[1]
    key = CacheKey(sha256_of_data(made_of), len(images), dim, settings.views, settings.dtype)
    with collectives.main_first():  # which makes the files
        cache = TeacherCache(run.runs / "cache", key, images.rows, made_of)
    there, cost = cache.count(), cache.seconds_per_crop()
    spared = f", about {there * cost:,.0f} s of the teacher's time" if there and cost is not None else ""
    report(
        Notice(
            f"teacher cache: {there:,} of {settings.views * len(images):,} crops are there{spared}; all take "
            f"{key.size_bytes / 1e6:,.1f} MB in {cache.folder}"
        )
    )
    return cache


def _distillation_loss(
    model: nn.Module, batch: Batch, probe: bool, asked: CachedTeacher, recipe: Recipe, student: Student
) -> StepResult:
    output = model(batch.inputs[1])
    taught = asked(batch) if recipe.loss.needs_teacher else None
    terms = loss_terms(output, taught, recipe.loss, batch.labels)
    figures = dict(terms)
    if student.edu_attention is not None:
        figures["gate"] = student.edu_attention.gate
    probed = {}
    if probe and len(terms) > 1 and recipe.precision != "fp16":  # whose unscaled gradients would vanish
        shares = gradient_shares(terms, output.projected)
        probed = {f"{name}_gradient_share": share for name, share in shares.items()}
    return StepResult(torch.stack(list(terms.values())).sum(), figures, probed)


def _known(recipe: Recipe, asked: CachedTeacher) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """For the loader, which crops the teacher need not see; None: it sees every crop."""
    if not recipe.loss.needs_teacher:
        return lambda _view, indices: np.ones(len(indices), dtype=bool)
    return asked.known if asked.cache else None


def _rate_factors(recipe: Recipe) -> dict[str, float]:
    attention = recipe.loss.edu_attention
    return {} if attention is None else {"edu_attention.gate": attention.gate_learning_rate_factor}


def _report_idle_gate(recipe: Recipe, student: Student, report: Report) -> None:
    """Say so where EduAttention did nothing: a gate that stays shut is a finding, not a failure."""
    settings = recipe.loss.edu_attention
    if settings is None or student.gate is None:
        return
    if abs(student.gate) < IDLE_GATE and abs(settings.gate_start) < IDLE_GATE:
        report(
            Notice(
                f"EduAttention's gate ended at {student.gate:.4f}: it hardly acts in this student; compare with "
                "loss.edu_attention=null, or raise loss.edu_attention.gate_learning_rate_factor"
            )
        )


def _size(module: nn.Module) -> str:
    return f"{parameters(module):,}"
