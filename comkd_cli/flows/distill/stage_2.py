"""Stage 2, top to bottom: the loss of a training step, and the run around it.

The step is `Distillation.loss`. Of the paper, the student's forward pass holds the projector and EduAttention
(method/student.py), and method/objective.py holds the terms: refinement and IFAlign. training/loop.py calls it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from comkd_cli.data.loaders import Batch, Crops, Steps, TrainingLoader, training_workers, worker_count
from comkd_cli.data.source import ImageSet
from comkd_cli.data.transforms import stable_seed
from comkd_cli.edge.images import Preprocessing
from comkd_cli.evaluation.subjects import Subject, live_student, live_teacher
from comkd_cli.evaluation.zero_shot import SELECTION_SCORE, Scorer
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.files import remove_folder, write_text
from comkd_cli.flows.distill.run import Run, finished, selection_classes
from comkd_cli.flows.distill.teacher_cache import open_cache
from comkd_cli.flows.distill.teacher_check import check_teacher
from comkd_cli.method.objective import loss_terms
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import ImageTower, build_image_tower, recompute_activations, state_sha256
from comkd_cli.models.checkpoints import StudentRecord, save_student
from comkd_cli.models.costs import parameters, step_multiply_adds
from comkd_cli.models.warm_start import WarmStart
from comkd_cli.recipe import Recipe, to_yaml
from comkd_cli.results.curve import IDLE_GATE, judge
from comkd_cli.results.result_files import forget_model
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.cores import chooses_threads, step_threads
from comkd_cli.runtime.locks import if_free, sole_writer
from comkd_cli.teachers.cached import CachedTeacher
from comkd_cli.teachers.loading import ReadyTeacher, TeacherSource
from comkd_cli.training.checkpoint import delete_checkpoint, has_checkpoint
from comkd_cli.training.gradient_shares import gradient_shares
from comkd_cli.training.loop import Trainer
from comkd_cli.training.state_files import has_leftovers
from comkd_cli.training.task import Objective, StepResult, Task


@dataclass(frozen=True)
class Distillation(Objective):
    """What stage 2 minimises: the recipe's terms between the student and its frozen teacher."""

    recipe: Recipe
    student: Student
    teacher: CachedTeacher
    scorer: Scorer
    preprocessing: Preprocessing
    """The student's."""

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        """One step: student and teacher see the same crops, and the weighted terms that compare them are summed.

        batch.inputs: of the teacher and of the student, (batch, 3, size, size) each.
        """
        settings = self.recipe.loss
        student = model(batch.inputs[1])  # u_s, n(f_e) after EduAttention, and logits
        teacher = self.teacher(batch) if settings.needs_teacher else None  # u_t and logits
        terms = loss_terms(student, teacher, settings, batch.labels)  # refinement, IFAlign, and the recipe's others
        loss = torch.stack(list(terms.values())).sum()
        return StepResult(loss, self._figures(terms), self._gradient_shares(terms, student.projected) if probe else {})

    def _figures(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        attention = self.student.edu_attention
        return dict(terms) if attention is None else {**terms, "gate": attention.gate}

    def _gradient_shares(self, terms: dict[str, Tensor], projected: Tensor) -> dict[str, float]:
        if len(terms) == 1 or self.recipe.precision == "fp16":  # whose unscaled gradients would vanish
            return {}
        return {f"{name}_gradient_share": share for name, share in gradient_shares(terms, projected).items()}

    def evaluate(self) -> dict[str, float]:
        """The student's scores on the test images, with the tower not compiled, as `comkd evaluate` runs it."""
        with _uncompiled(self.recipe):
            student = live_student(self.student, self.preprocessing, self.student.class_vectors.device)
            return self.scorer(student, selection_classes(self.recipe))

    def flush(self, epoch_ended: bool) -> None:
        """Write the teacher's new features to its cache."""
        self.teacher.flush(epoch_ended)

    @property
    def uses_all_parameters(self) -> bool:
        """See `Task`: EduAttention gets gradients only from the logits."""
        return self.student.edu_attention is None or self.recipe.loss.uses_logits

    @property
    def is_cached(self) -> Callable[[int, np.ndarray], np.ndarray] | None:
        """Which crops the teacher need not see, by view and indices, for the loader; None: it sees every crop."""
        if not self.recipe.loss.needs_teacher:
            return lambda _view, indices: np.ones(len(indices), dtype=bool)
        return self.teacher.is_cached if self.teacher.cache else None


def distill(
    run: Run,
    teacher: TeacherSource,
    accelerator: Accelerator,
    report: Report,
    resume_line: str,
    fresh: bool = False,
) -> Path:
    """Train the run's student, resuming from its checkpoint if there is one, and return its student.pt.

    teacher: prepared once everything that could be refused has been checked, since training it can take hours.
    resume_line: the command that resumes the run. fresh: discard the files of this run. Raises DataError, ModelError,
    TrainingError, CheckpointError, Interrupted, or InUseError if another process is making the run.
    """
    with collectives.main_holds(sole_writer(run.folder)):
        if not fresh and finished(run, report):  # in the meantime, by another process
            return run.student_file
        return _distill(run, teacher, accelerator, report, resume_line, fresh)


def _distill(
    run: Run, teacher: TeacherSource, accelerator: Accelerator, report: Report, resume_line: str, fresh: bool
) -> Path:
    recipe = run.recipe
    _check(run, resume=not fresh)
    start = collectives.on_every_rank(lambda: WarmStart.of(recipe.student))
    tower = _build_backbone(recipe, start, report)
    ready = teacher.prepare()
    if fresh:
        _discard(run)
    ready.teacher.to(accelerator.device)
    if recipe.loss.needs_teacher:
        check_teacher(run, ready, accelerator.device, report)
    backbone_sha256 = state_sha256(tower.module) if recipe.student.train == "prompts" else None
    student = build_student(recipe, tower, ready.teacher.class_vectors, ready.teacher.logit_scale)
    if start is not None:
        start.load_into(student, report)
    student.to(accelerator.device)
    threads = _threads(run, student, tower, ready) if chooses_threads(accelerator.device.type) else None
    if recipe.compile:
        # Only the towers: the rest is small, and gradients are measured between it and the tower.
        student.backbone.compile()
        ready.teacher.image_tower.compile()
    report(Stage(f"Student: {parameters(student):,} parameters, {_images_text(run)}"))
    if ranks.is_main():
        write_text(run.folder / "recipe.yaml", to_yaml(recipe))

    workers = worker_count(recipe.data)
    scorer = Scorer(
        run.source,
        accelerator.device,
        workers,
        report,
        recipe.data.unreadable_limit_percent,
        _as_subject(ready) if recipe.loss.needs_teacher else None,
    )
    cache = open_cache(run, ready, report) if recipe.loss.needs_teacher else None
    objective = Distillation(recipe, student, CachedTeacher(ready.teacher, cache), scorer, tower.preprocessing)
    task = _task(run, run.images_to_crop(report), objective, ready.preprocessing, resume_line, threads)
    history = Trainer(task, accelerator, report).fit()

    objective.teacher.report_savings(report)
    _report_idle_gate(recipe, student, report)
    if recipe.evaluate_every_epochs:
        report(Notice(judge(history).sentence))
    _save(run, student, _record(run, tower, ready, backbone_sha256, task.kept_figures(history)), report)
    return run.student_file


def _save(run: Run, student: Student, record: StudentRecord, report: Report) -> None:
    """Write student.pt, and delete what was made of an older one and the checkpoint."""
    with collectives.without_timeout():  # disks can be slow
        if ranks.is_main():
            # First: once there is a student.pt, the run counts as finished, also if the process is killed here.
            _delete_results(run.folder)
            forget_model(run.runs, str(run.student_file), report)
            save_student(run.student_file, student, record)
    delete_checkpoint(run.folder)
    collectives.barrier()


def remove_leftovers(run: Run) -> None:
    """Delete the checkpoint and the lock of a finished run, left by a process that was killed before it could do so."""
    if ranks.is_main() and has_leftovers(run.folder):
        with if_free(run.folder) as free:
            if free:
                delete_checkpoint(run.folder)


def _as_subject(ready: ReadyTeacher) -> Subject:
    teacher = ready.teacher
    return live_teacher(teacher.image_tower, teacher.class_vectors, teacher.logit_scale, ready.preprocessing)


def build_student(recipe: Recipe, tower: ImageTower, class_vectors: Tensor, logit_scale: Tensor) -> Student:
    """The untrained student of a recipe; the parameters beside the tower are drawn from the recipe's seed.

    class_vectors: (classes, dim), L2-normalised; logit_scale: a scalar; both the teacher's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_seed("student", recipe.seed))
        return Student(tower.module, tower.width, class_vectors, logit_scale, recipe.student, recipe.loss.edu_attention)


def _check(run: Run, resume: bool) -> None:
    """Refuse what cannot work before hours go into a teacher."""
    run.check_images()
    run.check_selection()
    if resume:
        has_checkpoint(run.folder, run.identity)  # raises if it is another run's
    run.check_steps()
    run.check_start()


def _build_backbone(recipe: Recipe, start: WarmStart | None, report: Report) -> ImageTower:
    seed = stable_seed("backbone", recipe.seed)

    def build() -> ImageTower:
        if start is not None:
            return start.build_tower(recipe.student, seed, report)
        return build_image_tower(recipe.student, seed, report=report)

    tower = collectives.on_every_rank(build)
    if recipe.checkpointing:
        recompute_activations(tower.module)
    return tower


def _discard(run: Run) -> None:
    """Delete the checkpoint and the student of an earlier run."""
    delete_checkpoint(run.folder)
    if ranks.is_main():
        run.student_file.unlink(missing_ok=True)
    collectives.barrier()


def _threads(run: Run, student: Student, tower: ImageTower, ready: ReadyTeacher) -> int | None:
    """The threads that compute a step: as many with a cache as without one, and so with the same bits."""
    seen = (ready.teacher.image_tower, ready.preprocessing.size) if run.recipe.loss.needs_teacher else None
    size = step_multiply_adds(run.batch_size, (student.backbone, tower.preprocessing.size), seen)
    return step_threads(size)


def _workers(run: Run) -> int:
    return training_workers(run.recipe.data, run.recipe.optim.epochs * len(run.source.train))


def _task(
    run: Run,
    images: ImageSet,
    objective: Distillation,
    teacher_preprocessing: Preprocessing,
    resume_line: str,
    threads: int | None,
) -> Task:
    """images: to train on, with their copies."""
    recipe, cache = run.recipe, run.recipe.teacher_cache
    attention = recipe.loss.edu_attention
    return Task(
        model=objective.student,
        objective=objective,
        loader=TrainingLoader(
            images,
            [teacher_preprocessing, objective.preprocessing],
            Crops(recipe.augment, cache.seed, cache.views) if cache else Crops(recipe.augment, recipe.seed),
            Steps(recipe.optim.batch_size, recipe.seed, recipe.optim.accumulation_steps),
            _workers(run),
            is_cached=objective.is_cached,
        ),
        optim=recipe.optim,
        folder=run.folder,
        identity=run.identity,
        seed=stable_seed("student training", recipe.seed),
        label="student",
        resume_line=resume_line,
        unreadable_limit_percent=recipe.data.unreadable_limit_percent,
        rate_factors={} if attention is None else {"edu_attention.gate": attention.gate_learning_rate_factor},
        evaluate_every_epochs=recipe.evaluate_every_epochs,
        track=recipe.track,
        track_every_steps=recipe.track_every_steps,
        checkpoint_every_minutes=recipe.checkpoint_every_minutes,
        held_out=run.source.holdout is not None,
        select_by=SELECTION_SCORE if selection_classes(recipe) else None,
        ema_decay=recipe.ema_decay,
        uses_all_parameters=objective.uses_all_parameters,
        threads=threads,
    )


def _images_text(run: Run) -> str:
    """The training images, and how many of their labels are used."""
    images, labelled = len(run.source.train), run.source.train.labelled_count
    if run.recipe.loss.labels is None:
        return f"{images} images, their labels unused" if labelled else f"{images} images without labels"
    return f"{images} images with their labels" if labelled == images else f"{images} images, {labelled} with a label"


def _uncompiled(recipe: Recipe) -> AbstractContextManager[object]:
    """A context in which compiled towers run uncompiled."""
    return torch.compiler.set_stance("force_eager") if recipe.compile else nullcontext()


def _report_idle_gate(recipe: Recipe, student: Student, report: Report) -> None:
    """Report if EduAttention did nothing: a gate that stays closed is a finding, not a failure."""
    settings = recipe.loss.edu_attention
    if settings is None or student.gate is None:
        return
    if abs(student.gate) < IDLE_GATE and abs(settings.gate_start) < IDLE_GATE:
        report(
            Notice(
                f"EduAttention's gate ended at {student.gate:.4f}, so it has almost no effect in this student; "
                "compare with loss.edu_attention=null, or raise loss.edu_attention.gate_learning_rate_factor"
            )
        )


def _record(
    run: Run, tower: ImageTower, ready: ReadyTeacher, backbone_sha256: str | None, metrics: dict[str, float]
) -> StudentRecord:
    return StudentRecord(
        recipe=run.recipe,
        recipe_name=run.name,
        source=run.source.name,
        class_names=run.source.class_names,
        template=run.source.template,
        templates=run.source.wording.templates,
        descriptions=dict(run.source.wording.descriptions),
        preprocessing=tower.preprocessing,
        backbone=tower.origin,
        backbone_sha256=backbone_sha256,
        teacher=os.path.relpath(ready.checkpoint, run.folder) if ready.checkpoint else None,
        identity=run.identity.digest,
        identity_parts=dict(run.identity.parts),
        metrics=metrics,
        teacher_sha256=dict(ready.sha256),
        holdout=run.source.holdout,
    )


def _delete_results(folder: Path) -> None:
    """Delete the scores and the bundle of an earlier student."""
    for name in ("results.json", "results.csv", "results.md", "results.tex", "report.html"):
        (folder / name).unlink(missing_ok=True)
    remove_folder(folder / "bundle")
