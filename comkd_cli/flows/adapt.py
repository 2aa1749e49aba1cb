"""Stage 1: a teacher for the data at hand, trained once and reused by every run that shares it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from comkd_cli.data.loaders import Batch, Crops, Steps, TrainingLoader, worker_count
from comkd_cli.data.source import Source
from comkd_cli.data.sources import open_source
from comkd_cli.data.splits import draw_shots, halves
from comkd_cli.data.transforms import stable_seed
from comkd_cli.errors import DataError
from comkd_cli.evaluation.subjects import live_teacher
from comkd_cli.evaluation.zero_shot import Scorer
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.files import sha256_of_data
from comkd_cli.method.prompt_src import epoch_weights, frozen_class_vectors, prompt_src_terms
from comkd_cli.method.teacher import PromptClassifier
from comkd_cli.models.backbones import (
    PROMPTSRC_TEMPLATES,
    Clip,
    build_clip,
    recompute_activations,
    state_sha256,
    uses_all_parameters,
    weights_sha256,
)
from comkd_cli.models.checkpoints import SavedTeacher, TeacherRecord, save_teacher
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import FullAdapt, Model, NoAdapt, PromptSrcAdapt, Teacher
from comkd_cli.runtime import collectives, ranks
from comkd_cli.teachers.loading import (
    ReadyTeacher,
    encode_prompts,
    made_teacher,
    prompted_clip,
    report_cut,
    saved_teacher,
    tokenize_apart,
)
from comkd_cli.training.loop import StepResult, Task, delete_checkpoint, fit


@dataclass(frozen=True)
class Stage1:
    """The teacher of a recipe: what it is made from, and where it is kept."""

    recipe: Recipe
    source: Source
    """What the student learns from; the teacher names its classes."""
    lessons: Source
    """What the teacher is adapted on: the same, unless `teacher.adapt.data` says otherwise."""
    runs: Path

    @property
    def settings(self) -> Teacher:
        """The recipe's teacher."""
        return self.recipe.teacher

    @property
    def adapts(self) -> bool:
        """Whether anything is trained."""
        return self.settings.adapt.method != "none"

    @cached_property
    def contents(self) -> dict[str, Any]:
        """Named digests of what the teacher is made from, beside its settings: weights and, where it trains, images."""
        teacher, adapt = self.settings, self.settings.adapt
        base = Model(arch=teacher.arch, config=teacher.config, weights=teacher.backbone_weights)
        found: dict[str, Any] = {
            "weights_sha256": weights_sha256(teacher),
            "backbone_weights_sha256": weights_sha256(base) if teacher.backbone_weights else None,
        }
        if isinstance(adapt, NoAdapt):
            return found
        source = _lessons(self, adapt) if isinstance(adapt, PromptSrcAdapt) else self.lessons
        images = source.identity()
        return {
            **found,
            # Learned prompts replace the words of the template.
            "prompts" if isinstance(adapt, FullAdapt) else "class_names": (
                source.prompts if isinstance(adapt, FullAdapt) else images["class_names"]
            ),
            "images": images["training_images"],
            "labels": images["training_labels"],
        }

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """All that decides the trained teacher, by name; students of other data can share it."""
        teacher, adapt = self.settings, self.settings.adapt
        parts: dict[str, Any] = {
            "model": _model_fields(teacher),
            "format": teacher.format,
            "adapt": adapt.model_dump(mode="json", exclude={"data", "classes_at_once"}),
            **self.contents,
        }
        if self.adapts:
            parts |= {"augment": self.recipe.augment.model_dump(mode="json"), "precision": self.recipe.precision}
        return parts

    @cached_property
    def key(self) -> str:
        """A digest of all that decides the trained teacher."""
        return sha256_of_data(self.made_of)

    @property
    def folder(self) -> Path:
        """Where an adapted teacher is kept; teachers that differ in anything have different folders."""
        return self.runs / "teachers" / f"{self.lessons.name}-{self.key[:12]}"

    @property
    def file(self) -> Path:
        """teacher.pt of an adapted teacher."""
        return self.folder / "teacher.pt"


def stage_1(recipe: Recipe, source: Source, data_root: Path, runs: Path, report: Report = lambda event: None) -> Stage1:
    """The recipe's teacher. Raises DataError where the data that it is adapted on can't be read."""
    adapt = recipe.teacher.adapt
    own = isinstance(adapt, PromptSrcAdapt) and adapt.data is not None
    lessons = open_source(adapt.data, data_root, runs, report) if own else source  # type: ignore[union-attr,arg-type]
    return Stage1(recipe, source, lessons, runs)


def ready_teacher(stage: Stage1, accelerator: Accelerator, report: Report, resume_line: str) -> ReadyTeacher:
    """The recipe's teacher: as its weights are, or adapted, trained now unless its file is there already.

    Raises DataError where it would need labels that are not there, and what `training.fit` raises.
    """
    settings, adapt, names = stage.settings, stage.settings.adapt, stage.source.class_names
    if isinstance(adapt, NoAdapt):
        report(Stage(f"Teacher: {_name(settings)}, {_as_it_is(settings)}"))
        template, device = stage.source.template, accelerator.device
        return collectives.on_every_rank(lambda: made_teacher(settings, names, template, device, report))
    if collectives.broadcast(stage.file.is_file()):
        report(Stage(f"Teacher: reused from {stage.file}"))
    elif isinstance(adapt, FullAdapt):
        report(Stage(f"Teacher: training all weights on {len(stage.lessons.train)} labelled images"))
        _train_fully(stage, adapt, accelerator, report, resume_line)
    else:
        lessons = _lessons(stage, adapt)
        report(
            Stage(
                f"Teacher: learning prompts from {len(lessons.train)} labelled images of {len(lessons.class_names)} "
                f"classes of {lessons.name}"
            )
        )
        _learn_prompts(stage, adapt, lessons, accelerator, report, resume_line)
    return collectives.on_every_rank(lambda: saved_teacher(stage.file, names, accelerator.device, stage.key, report))


def describe_stage(stage: Stage1) -> str:
    """One line on what stage 1 would do. Raises DataError where it lacks labels."""
    settings, adapt = stage.settings, stage.settings.adapt
    if isinstance(adapt, NoAdapt):
        return f"none: {_as_it_is(settings)} with the weights {settings.weights or settings.arch}"
    if stage.file.is_file():
        return f"{adapt.method}: reused from {stage.file}"
    _check_labels(stage.lessons, adapt.method)
    lessons = stage.lessons if isinstance(adapt, FullAdapt) else _lessons(stage, adapt)
    images = len(lessons.train)
    return (
        f"{adapt.method}: {adapt.epochs} epochs of {images // min(adapt.batch_size, images):,} steps on {lessons.name}"
    )


def _name(settings: Teacher) -> str:
    return settings.arch or "inline model"


def _as_it_is(settings: Teacher) -> str:
    return "with the prompts of its checkpoint" if settings.format == "promptsrc" else "zero-shot"


def _check_labels(source: Source, method: str) -> None:
    if source.train.labels is None or len(source.train) < 2:
        raise DataError(
            f"{source.name}: teacher.adapt: {method} learns from labels, and the training images have none; "
            "sort them into train/ with a sub-folder a class, or use a pretrained teacher with adapt: none"
        )


def _lessons(stage: Stage1, adapt: PromptSrcAdapt) -> Source:
    """The labelled images that prompts learn from: the shots, then the half of the classes.

    In this order, as CoOp has it: base-class shots are those that a draw of all classes has.
    """
    source = stage.lessons
    _check_labels(source, adapt.method)
    labels = source.train.labels or ()
    chosen = list(range(len(labels)))
    if adapt.shots is not None:
        chosen, _ = draw_shots(labels, source.val.labels or () if source.val else (), adapt.shots, adapt.seed)
    classes = halves(len(source.class_names))[adapt.classes]
    train = source.train.subset([position for position in chosen if labels[position] in classes])
    if len(train) < 2:
        raise DataError(
            f"{source.name}: teacher.adapt has {len(train)} labelled images of the {adapt.classes} classes to learn "
            "from; give more of them, or use classes: all"
        )
    test = source.test
    if test is not None and test.labels is not None:
        test = test.subset([position for position, label in enumerate(test.labels) if label in classes])
    return replace(source, class_names=source.class_names[: len(classes)], train=train, test=test)


def _train_fully(stage: Stage1, adapt: FullAdapt, accelerator: Accelerator, report: Report, resume_line: str) -> None:
    recipe, source = stage.recipe, stage.lessons
    _check_labels(source, adapt.method)
    seed = stable_seed("teacher", adapt.seed)
    clip = collectives.on_every_rank(lambda: build_clip(recipe.teacher, seed, report=report))
    if recipe.checkpointing:
        recompute_activations(clip.model.visual)  # type: ignore[arg-type]
    tokens = tokenize_apart(clip, source.class_names, source.template, report)
    classifier = PromptClassifier(clip.model, tokens).to(accelerator.device)
    scorer = _scorer(stage, source, accelerator.device, report)

    def score() -> dict[str, float]:
        classifier.eval()
        vectors = encode_prompts(clip, source.class_names, source.template, accelerator.device)
        tower: nn.Module = clip.model.visual  # type: ignore[assignment]
        return scorer(live_teacher(tower, vectors, classifier.logit_scale.detach(), clip.preprocessing))

    def loss(model: nn.Module, batch: Batch, _probe: bool) -> StepResult:
        return _cross_entropy(model, batch, adapt.label_smoothing)

    task = _task(stage, adapt, source, clip, classifier, loss, score, resume_line)
    history = fit(replace(task, uses_all_parameters=uses_all_parameters(clip.model)), accelerator, report)
    classifier.eval()
    vectors = encode_prompts(clip, source.class_names, source.template, accelerator.device)
    record = _record(stage, source, clip, history)
    _save(stage, SavedTeacher(record, vectors, classifier.logit_scale.detach(), clip.model.state_dict()), report)


def _learn_prompts(
    stage: Stage1,
    adapt: PromptSrcAdapt,
    source: Source,
    accelerator: Accelerator,
    report: Report,
    resume_line: str,
) -> None:
    recipe, device = stage.recipe, accelerator.device
    clip = collectives.on_every_rank(lambda: build_clip(recipe.teacher, report=report))
    if recipe.checkpointing:
        recompute_activations(clip.model.visual)  # type: ignore[arg-type]
    clip.model.to(device)
    backbone_sha256 = state_sha256(clip.model)
    report_cut(clip, source.class_names, PROMPTSRC_TEMPLATES, report)
    templates = [
        clip.tokenize([template.replace("{}", name) for name in source.class_names]).to(device)
        for template in PROMPTSRC_TEMPLATES
    ]
    frozen_classes = frozen_class_vectors(clip.model, templates)
    seed = stable_seed("teacher prompts", adapt.seed)
    prompted = prompted_clip(clip, adapt.vision_depth, adapt.text_depth, adapt.tokens, seed)
    module = prompted.module.to(device)
    tokens = prompted.tokens(source.class_names).to(device)
    scorer = _scorer(stage, source, device, report)

    def loss(model: nn.Module, batch: Batch, _probe: bool) -> StepResult:
        output = model(batch.inputs[0], tokens, frozen_classes, adapt.classes_at_once)
        assert batch.labels is not None  # as _check_labels made sure
        terms = prompt_src_terms(
            output, batch.labels, frozen_classes, adapt.text_weight, adapt.image_weight, adapt.logits_weight
        )
        return StepResult(torch.stack(list(terms.values())).sum(), dict(terms))

    def score() -> dict[str, float]:
        module.eval()
        with torch.no_grad():
            vectors = module.encode_classes(tokens)
        return scorer(live_teacher(module.vision, vectors, module.logit_scale, clip.preprocessing))

    task = _task(stage, adapt, source, clip, module, loss, score, resume_line)
    history = fit(replace(task, average=_epoch_weights(adapt), uses_all_parameters=True), accelerator, report)
    module.eval()
    with torch.no_grad():
        vectors = module.encode_classes(tokens)
    record = replace(_record(stage, source, clip, history), backbone_sha256=backbone_sha256)
    state = {f"prompts.{name}": value for name, value in module.prompts().items()}
    _save(stage, SavedTeacher(record, vectors, module.logit_scale, state), report)


def _scorer(stage: Stage1, source: Source, device: torch.device, report: Report) -> Scorer:
    data = stage.recipe.data
    return Scorer(source, device, worker_count(data), report, data.unreadable_limit_percent)


def _task(
    stage: Stage1,
    adapt: FullAdapt | PromptSrcAdapt,
    source: Source,
    clip: Clip,
    model: nn.Module,
    loss: Callable[[nn.Module, Batch, bool], StepResult],
    score: Callable[[], dict[str, float]],
    resume_line: str,
) -> Task:
    """What both ways of training have in common."""
    recipe = stage.recipe
    workers = worker_count(recipe.data)
    loader = TrainingLoader(
        source.train,
        [clip.preprocessing],
        Crops(recipe.augment, adapt.seed),
        Steps(adapt.batch_size, adapt.seed, adapt.accumulation_steps),
        workers,
    )
    return Task(
        model=model,
        loss=loss,
        loader=loader,
        optim=adapt,
        folder=stage.folder,
        identity=Identity(stage.made_of),
        seed=stable_seed("teacher training", adapt.seed),
        label="teacher",
        resume_line=resume_line,
        unreadable_limit_percent=recipe.data.unreadable_limit_percent,
        evaluate=score,
        evaluate_every_epochs=recipe.evaluate_every_epochs,
    )


def _epoch_weights(adapt: PromptSrcAdapt) -> Sequence[float] | None:
    if adapt.gaussian is None:
        return None
    mean = adapt.gaussian.mean or 0.75 * adapt.epochs
    return epoch_weights(adapt.epochs, mean, adapt.gaussian.deviation or adapt.epochs / 20)


def _record(stage: Stage1, source: Source, clip: Clip, history: list[dict[str, float]]) -> TeacherRecord:
    return TeacherRecord(
        key=stage.key,
        model=_model_fields(stage.settings),
        class_names=source.class_names,
        template=source.template,
        preprocessing=clip.preprocessing,
        origin=clip.origin,
        metrics=history[-1],
        made_of=stage.made_of,
    )


def _save(stage: Stage1, saved: SavedTeacher, report: Report) -> None:
    with collectives.without_timeout():  # disks can be slow
        if ranks.is_main():
            save_teacher(stage.file, saved)
    delete_checkpoint(stage.folder)
    collectives.barrier()
    report(Notice(f"teacher saved in {stage.folder}; later runs reuse it"))


def _cross_entropy(model: nn.Module, batch: Batch, label_smoothing: float) -> StepResult:
    logits: Tensor = model(batch.inputs[0])
    loss = functional.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)  # type: ignore[arg-type]
    return StepResult(loss)


def _model_fields(model: Model) -> dict[str, object]:
    return {"arch": model.arch, "config": model.config, "weights": model.weights}
