"""Stage 1: a teacher for the data at hand, trained once and reused by every run that shares it."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from comkd_cli.backbones import build_clip, weights_sha256
from comkd_cli.checkpoints import SavedTeacher, TeacherRecord, save_teacher
from comkd_cli.data.loaders import Batch, TrainingLoader, worker_count
from comkd_cli.data.source import Source
from comkd_cli.data.transforms import stable_seed
from comkd_cli.errors import DataError
from comkd_cli.evaluation.zero_shot import score_on_test
from comkd_cli.files import sha256_of_data
from comkd_cli.method.teacher import PromptClassifier
from comkd_cli.progress import Notice, Report, Stage
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.model import FullAdapt, Model
from comkd_cli.teachers import ReadyTeacher, encode_prompts, saved_teacher, tokenize_apart, zero_shot_teacher
from comkd_cli.training import StepResult, Task, fit, forget_state


def teacher_identity(recipe: Recipe, source: Source) -> str:
    """A digest of all that decides the teacher: its weights, how it is adapted, and on what."""
    teacher = recipe.teacher
    parts = {
        "model": _model_fields(teacher),
        "weights_sha256": weights_sha256(teacher),
        "adapt": {"method": teacher.adapt.method, **teacher.adapt.model_dump(mode="json", exclude_defaults=True)},
        "prompts": source.prompts,
    }
    if isinstance(teacher.adapt, FullAdapt):
        parts |= {
            "images": source.fingerprint(),
            "augment": recipe.augment.model_dump(mode="json", exclude_defaults=True),
            "precision": recipe.precision,
        }
    return sha256_of_data(parts)


def ready_teacher(
    recipe: Recipe, source: Source, runs: Path, accelerator: Accelerator, report: Report, resume_line: str
) -> ReadyTeacher:
    """The recipe's teacher: zero-shot, or adapted, trained now unless `runs` has it already.

    Raises DataError where it would need labels that are not there, and what `training.fit` raises.
    """
    adapt = recipe.teacher.adapt
    if not isinstance(adapt, FullAdapt):
        report(Stage(f"Teacher: {recipe.teacher.arch or 'inline model'}, zero-shot"))
        return zero_shot_teacher(recipe.teacher, source.prompts, accelerator.device)
    key = teacher_identity(recipe, source)
    folder = _folder_of(key, source, runs)
    path = folder / "teacher.pt"
    if path.is_file():
        report(Stage(f"Teacher: reused from {path}"))
    else:
        report(Stage(f"Teacher: training all weights on {len(source.train)} labelled images"))
        _train(recipe, adapt, source, folder, key, accelerator, report, resume_line)
    return saved_teacher(path, key)


def teacher_folder(recipe: Recipe, source: Source, runs: Path) -> Path:
    """Where an adapted teacher is kept; teachers that differ in anything have different folders."""
    return _folder_of(teacher_identity(recipe, source), source, runs)


def _folder_of(key: str, source: Source, runs: Path) -> Path:
    return runs / "teachers" / f"{source.name}-{key[:12]}"


def describe_stage(recipe: Recipe, source: Source, runs: Path) -> str:
    """One line on what stage 1 would do."""
    adapt = recipe.teacher.adapt
    if not isinstance(adapt, FullAdapt):
        return f"none: zero-shot with the weights {recipe.teacher.weights or recipe.teacher.arch}"
    if (path := teacher_folder(recipe, source, runs) / "teacher.pt").is_file():
        return f"full: reused from {path}"
    _check_labels(source)
    return f"full: {adapt.epochs} epochs of {len(source.train) // min(adapt.batch_size, len(source.train))} steps"


def _check_labels(source: Source) -> None:
    if source.train.labels is None or len(source.train) < 2:
        raise DataError(
            f"{source.name}: teacher.adapt: full learns from labels, and the training images have none; "
            "sort them into train/ with a sub-folder a class, or use a pretrained teacher with adapt: none"
        )


def _train(
    recipe: Recipe,
    adapt: FullAdapt,
    source: Source,
    folder: Path,
    key: str,
    accelerator: Accelerator,
    report: Report,
    resume_line: str,
) -> None:
    _check_labels(source)
    clip = build_clip(recipe.teacher, stable_seed("teacher", adapt.seed))
    workers = worker_count(recipe.data)
    classifier = PromptClassifier(clip.model, tokenize_apart(clip, source.prompts)).to(accelerator.device)

    def score() -> dict[str, float]:
        return score_on_test(classifier, classifier, source, clip.preprocessing, accelerator.device, workers, report)

    history = fit(
        Task(
            model=classifier,
            loss=lambda model, batch, _probe: _cross_entropy(model, batch, adapt.label_smoothing),
            loader=TrainingLoader(
                source.train, [clip.preprocessing], recipe.augment, adapt.batch_size, adapt.seed, workers
            ),
            optim=adapt,
            folder=folder,
            identity=key,
            seed=stable_seed("teacher training", adapt.seed),
            label="teacher",
            resume_line=resume_line,
            unreadable_limit_percent=recipe.data.unreadable_limit_percent,
            evaluate=score,
            evaluate_every_epochs=recipe.evaluate_every_epochs,
        ),
        accelerator,
        report,
    )
    classifier.eval()
    record = TeacherRecord(
        key=key,
        model=_model_fields(recipe.teacher),
        class_names=source.class_names,
        template=source.template,
        preprocessing=clip.preprocessing,
        origin=clip.origin,
        metrics=history[-1],
    )
    vectors = encode_prompts(clip, source.prompts, accelerator.device)
    scale = classifier.logit_scale.detach()
    save_teacher(folder / "teacher.pt", SavedTeacher(record, vectors, scale, clip.model.state_dict()))
    forget_state(folder)
    report(Notice(f"teacher saved in {folder}; later runs reuse it"))


def _cross_entropy(model: nn.Module, batch: Batch, label_smoothing: float) -> StepResult:
    logits: Tensor = model(batch.inputs[0])
    loss = functional.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)  # type: ignore[arg-type]
    return StepResult(loss)


def _model_fields(model: Model) -> dict[str, object]:
    return {"arch": model.arch, "config": model.config, "weights": model.weights}
