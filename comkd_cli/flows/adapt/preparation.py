"""Prepares the teacher of a run: as its weights are, or adapted, trained now unless teacher.pt exists."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from comkd_cli.data.loaders import Crops, Steps, TrainingLoader, training_workers
from comkd_cli.data.transforms import stable_seed
from comkd_cli.events import Notice, Report, Stage
from comkd_cli.flows.adapt.adaptation import Adaptation, FullAdaptation, PromptAdaptation
from comkd_cli.flows.adapt.probe import ProbeAdaptation
from comkd_cli.flows.adapt.stage import Stage1, check_labels, check_probe
from comkd_cli.models.checkpoints import SavedTeacher, save_teacher
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import FullAdapt, LinearProbeAdapt, NoAdapt, PromptSrcAdapt, Teacher
from comkd_cli.runtime import collectives, ranks
from comkd_cli.runtime.cores import chooses_threads, step_threads
from comkd_cli.runtime.locks import in_turn_with_others
from comkd_cli.teachers.loading import ReadyTeacher, build_teacher, load_saved_teacher
from comkd_cli.training.checkpoint import delete_checkpoint
from comkd_cli.training.loop import Trainer
from comkd_cli.training.state_files import has_leftovers
from comkd_cli.training.task import Task


@dataclass(frozen=True)
class TeacherPreparation:
    """Stage 1, which stage 2 starts by calling `prepare`."""

    stage: Stage1
    accelerator: Accelerator
    report: Report
    resume_line: str
    """The command that resumes the run, for the message of an interruption."""

    def prepare(self) -> ReadyTeacher:
        """The recipe's teacher on the accelerator's device, trained if it has to be.

        If another process is training the same teacher, it waits for that one and loads what it saved. Raises
        DataError if training it needs labels that are missing, and what `Trainer.fit` raises.
        """
        stage, settings, names = self.stage, self.stage.settings, self.stage.source.class_names
        device = self.accelerator.device
        if isinstance(settings.adapt, NoAdapt):
            name = settings.arch or "inline model"
            self.report(Stage(f"Teacher: {name}, {_prompts_of(settings)}"))
            prompts = stage.source.wording
            return collectives.on_every_rank(lambda: build_teacher(settings, names, prompts, device, self.report))
        if collectives.broadcast(stage.file.is_file() and not has_leftovers(stage.folder)):
            self.report(Stage(f"Teacher: reused from {stage.file}"))
        else:
            with collectives.main_holds(in_turn_with_others(stage.folder, self.report)):
                self._make(settings.adapt)
        return collectives.on_every_rank(lambda: load_saved_teacher(stage.file, names, device, stage.key, self.report))

    def _make(self, adapt: FullAdapt | PromptSrcAdapt | LinearProbeAdapt) -> None:
        """Train and save the teacher, unless another process has done it meanwhile."""
        stage = self.stage
        if collectives.broadcast(stage.file.is_file()):
            self.report(Stage(f"Teacher: reused from {stage.file}"))
            delete_checkpoint(stage.folder)
        elif isinstance(adapt, LinearProbeAdapt):
            self._save(ProbeAdaptation(stage, adapt, self.accelerator.device, self.report).fit())
        else:
            self._train(self._adaptation(adapt), adapt)

    def _adaptation(self, adapt: FullAdapt | PromptSrcAdapt) -> Adaptation:
        if isinstance(adapt, FullAdapt):
            images = len(self.stage.adaptation_source.train)
            self.report(Stage(f"Teacher: training all weights on {images} labelled images"))
            return FullAdaptation(self.stage, adapt, self.accelerator.device, self.report)
        source = self.stage.prompt_source(adapt)
        self.report(
            Stage(
                f"Teacher: training prompts on {len(source.train)} labelled images of {len(source.class_names)} "
                f"classes of {source.name}"
            )
        )
        return PromptAdaptation(self.stage, adapt, source, self.accelerator.device, self.report)

    def _train(self, adaptation: Adaptation, adapt: FullAdapt | PromptSrcAdapt) -> None:
        stage, recipe = self.stage, self.stage.recipe
        workers = training_workers(recipe.data, adapt.epochs * len(adaptation.source.train))
        chooses = chooses_threads(self.accelerator.device.type)
        task = Task(
            model=adaptation.model,
            objective=adaptation,
            loader=TrainingLoader(
                stage.images_to_crop(adaptation.source.train, self.report),
                [adaptation.clip.preprocessing],
                Crops(recipe.augment.crops, adapt.seed),
                Steps(adapt.batch_size, adapt.seed, adapt.accumulation_steps),
                workers,
            ),
            optim=adapt,
            folder=stage.folder,
            identity=Identity(stage.made_of),
            seed=stable_seed("teacher training", adapt.seed),
            label="teacher",
            resume_line=self.resume_line,
            unreadable_limit_percent=recipe.data.unreadable_limit_percent,
            evaluate_every_epochs=recipe.evaluate_every_epochs,
            track=recipe.track,
            track_every_steps=recipe.track_every_steps,
            checkpoint_every_minutes=recipe.checkpoint_every_minutes,
            held_out=adaptation.source.holdout is not None,
            average=adaptation.average,
            uses_all_parameters=adaptation.uses_all_parameters,
            threads=step_threads(adaptation.step_multiply_adds(adapt.batch_size)) if chooses else None,
        )
        history = Trainer(task, self.accelerator, self.report).fit()
        self._save(adaptation.saved_teacher(history[-1]))

    def _save(self, saved: SavedTeacher) -> None:
        stage = self.stage
        with collectives.without_timeout():  # disks can be slow
            if ranks.is_main():
                save_teacher(stage.file, saved)
        delete_checkpoint(stage.folder)
        collectives.barrier()
        self.report(Notice(f"teacher saved in {stage.folder}; later runs reuse it"))


def describe_stage(stage: Stage1) -> str:
    """One line on what stage 1 would do. Raises DataError if it lacks labels."""
    settings, adapt = stage.settings, stage.settings.adapt
    if isinstance(adapt, NoAdapt):
        return f"none: {_prompts_of(settings)} with the weights {settings.weights or settings.arch}"
    if stage.file.is_file():
        return f"{adapt.method}: reused from {stage.file}"
    check_labels(stage.adaptation_source, adapt.method)
    if isinstance(adapt, LinearProbeAdapt):
        images, name = stage.adaptation_source.train, stage.adaptation_source.name
        check_probe(images.labels or (), name)
        strengths = len(adapt.strengths)
        return f"{adapt.method}: {strengths} strengths, on {len(images):,} labelled images of {name}"
    source = stage.adaptation_source if isinstance(adapt, FullAdapt) else stage.prompt_source(adapt)
    steps = len(source.train) // min(adapt.batch_size, len(source.train))
    return f"{adapt.method}: {adapt.epochs} epochs of {steps:,} steps on {source.name}"


def _prompts_of(settings: Teacher) -> str:
    return "with the prompts of its checkpoint" if settings.format == "promptsrc" else "zero-shot"
