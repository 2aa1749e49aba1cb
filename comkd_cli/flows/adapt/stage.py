"""The teacher of a recipe: what it is made from, what it is trained on, and where it is saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from comkd_cli.data.copy_plan import CopyPlan, plan_copies, with_copies
from comkd_cli.data.held_out import without_images_of
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.sources import open_source
from comkd_cli.data.splits import draw_shots, halves
from comkd_cli.errors import DataError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.files import sha256_of_data
from comkd_cli.models.backbones import Clip, weights_sha256
from comkd_cli.models.checkpoints import TeacherRecord
from comkd_cli.models.input_size import input_size
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.model import Adapt, Data, FullAdapt, LinearProbeAdapt, Model, NoAdapt, PromptSrcAdapt, Teacher


@dataclass(frozen=True)
class Stage1:
    """The teacher of a recipe: what it is made from, and where it is saved."""

    recipe: Recipe
    source: Source
    """The student's data; the teacher classifies among its classes."""
    adaptation_source: Source
    """The data that the teacher is adapted to: the student's, unless `teacher.adapt.data` is set. Of partly labelled
    training images, it has those with a label."""
    runs: Path

    @property
    def settings(self) -> Teacher:
        """The recipe's teacher."""
        return self.recipe.teacher

    @property
    def adapts(self) -> bool:
        """Whether anything is trained."""
        return self.settings.adapt.method != "none"

    @property
    def data(self) -> Data:
        """The section of the recipe that names the images that the teacher is adapted to."""
        adapt = self.settings.adapt
        own = adapt.data if isinstance(adapt, PromptSrcAdapt) else None
        return own or self.recipe.data

    @cached_property
    def copy_plan(self) -> CopyPlan | None:
        """The copies that random crops are cut from, by the teacher's input alone: students of any input share it."""
        if not isinstance(self.settings.adapt, FullAdapt | PromptSrcAdapt):  # the others see no random crops
            return None
        min_scale = self.recipe.augment.min_scale
        return plan_copies(self.adaptation_source.train, self.data, lambda: input_size(self.settings), min_scale)

    def images_to_crop(self, images: ImageSet, report: Report) -> ImageSet:
        """The images that the teacher is trained on, with their copies if it uses some, which is reported."""
        return with_copies(images, self.copy_plan, self.data, self.runs, report)

    def prompt_source(self, adapt: PromptSrcAdapt) -> Source:
        """The labelled images that prompts are trained on: the shots of all classes, then the chosen half of these.

        In this order, as in CoOp: the shots of a base class are those that a draw for all classes gives it. Raises
        DataError if there are no labels, or fewer than two images.
        """
        source = self.adaptation_source
        check_labels(source, adapt.method)
        labels = source.train.labels or ()
        drawn = list(range(len(labels)))
        if adapt.shots is not None:
            drawn, _ = draw_shots(labels, source.val.labels or () if source.val else (), adapt.shots, adapt.seed)
        classes = halves(len(source.class_names))[adapt.classes]
        train = source.train.subset([index for index in drawn if labels[index] in classes])
        if len(train) < 2:
            raise DataError(
                f"prompts need at least 2 labelled images of the {adapt.classes} classes",
                path=source.name,
                field="teacher.adapt",
                found=len(train),
                remedy="add images of them, or use classes: all",
            )
        test = source.test
        if test is not None and test.labels is not None:
            test = test.subset([index for index, label in enumerate(test.labels) if label in classes])
        return replace(source, class_names=source.class_names[: len(classes)], train=train, test=test)

    @cached_property
    def contents(self) -> dict[str, Any]:
        """Named digests of what the teacher is made from, beside its settings: weights and, if it trains, images."""
        teacher, adapt = self.settings, self.settings.adapt
        base = Model(arch=teacher.arch, config=teacher.config, weights=teacher.backbone_weights)
        weights: dict[str, Any] = {
            "weights_sha256": weights_sha256(teacher),
            "backbone_weights_sha256": weights_sha256(base) if teacher.backbone_weights else None,
        }
        if isinstance(adapt, NoAdapt):
            return weights
        source = self.prompt_source(adapt) if isinstance(adapt, PromptSrcAdapt) else self.adaptation_source
        images = source.identity()
        return {
            **weights,
            **_words(source, adapt),
            "images": images["training_images"],
            "labels": images["training_labels"],
        }

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """All that decides the trained teacher, by name; students of other data can share it."""
        teacher, adapt = self.settings, self.settings.adapt
        settings = adapt.model_dump(mode="json", exclude={"data", "classes_at_once"})
        if settings.get("clip_gradient_norm") is None:  # the key of teachers of versions without this field
            settings.pop("clip_gradient_norm", None)
        parts: dict[str, Any] = {
            "model": model_fields(teacher),
            "format": teacher.format,
            "adapt": settings,
            **self.contents,
        }
        if isinstance(adapt, FullAdapt | PromptSrcAdapt):  # a probe sees centre crops in fp32
            crops = self.recipe.augment.crops.model_dump(mode="json", exclude_none=True)
            parts |= {"augment": crops, "precision": self.recipe.precision}
            if self.copy_plan is not None:  # without it as in versions without copies
                parts["resized"] = self.copy_plan.short_side
        return parts

    @cached_property
    def key(self) -> str:
        """A digest of all that decides the trained teacher."""
        return sha256_of_data(self.made_of)

    @property
    def folder(self) -> Path:
        """The directory of an adapted teacher; teachers that differ in anything have different directories."""
        return self.runs / "teachers" / f"{self.adaptation_source.name}-{self.key[:12]}"

    @property
    def file(self) -> Path:
        """teacher.pt of an adapted teacher."""
        return self.folder / "teacher.pt"


def _words(source: Source, adapt: Adapt) -> dict[str, Any]:
    """The parts of the source's names and prompts that decide the teacher, by name."""
    if isinstance(adapt, PromptSrcAdapt):  # learned prompts replace the words of the template
        return {"class_names": list(source.class_names)}
    if isinstance(adapt, LinearProbeAdapt):  # it starts from the vectors of all prompts
        return {"prompts": [list(source.wording.of(name)) for name in source.class_names]}
    return {"prompts": source.prompts}


def stage_1(recipe: Recipe, source: Source, data_root: Path, runs: Path, report: Report = ignore_event) -> Stage1:
    """Stage 1 of a recipe. Raises DataError if the data of `teacher.adapt.data` could not be read."""
    adapt, adaptation_source = recipe.teacher.adapt, source
    if isinstance(adapt, PromptSrcAdapt) and adapt.data is not None:
        own = open_source(adapt.data, data_root, runs, report)
        adaptation_source = _without_held_out(own, adapt.data, source, report)
    if adaptation_source.train.labels is not None:
        adaptation_source = replace(adaptation_source, train=adaptation_source.train.labelled)
    return Stage1(recipe, source, adaptation_source, runs)


def _without_held_out(own: Source, data: Data, source: Source, report: Report) -> Source:
    """The teacher's data without the images that are held out of the student's: it would be measured on them.

    own: opened from `data`. Only folders hold copies of a user's images.
    """
    if source.holdout is None or source.test is None or data.folder is None:
        return own
    by_name = "size_and_time" in (data.fingerprint, source.holdout.fingerprint)
    train = without_images_of(own.train, source.test, "size_and_time" if by_name else "contents")
    if len(train) == len(own.train):
        return own
    count = len(own.train) - len(train)
    report(Notice(f"{own.name}: {count:,} images are held out of {source.name}; the teacher is not trained on them"))
    return replace(own, train=train)


def check_labels(source: Source, method: str) -> None:
    """Raise DataError if the images to train a teacher on have no labels."""
    if source.train.labels is None or len(source.train) < 2:
        raise DataError(
            "adapting a teacher needs at least 2 labelled training images",
            path=source.name,
            field="teacher.adapt",
            found=method,
            remedy="sort the training images into one sub-folder of train/ per class, list labels in a file "
            "(`data.labels`), or use a pretrained teacher with teacher.adapt: none",
        )


def check_probe(labels: Sequence[int], dataset: str) -> None:
    """Raise DataError unless at least 2 classes have at least 2 labelled images: one to fit, one to validate on."""
    classes = sum(count >= 2 for count in Counter(labels).values())
    if classes < 2:
        raise DataError(
            "a linear probe needs at least 2 labelled images of each of 2 classes",
            path=dataset,
            field="teacher.adapt",
            found=f"{classes} such classes",
            remedy="label more images, or use adapt: none",
        )


def teacher_record(
    stage: Stage1, source: Source, clip: Clip, metrics: dict[str, float], backbone_sha256: str | None
) -> TeacherRecord:
    """The record of a teacher in teacher.pt. source: whose classes it was adapted to; clip: what it started from."""
    return TeacherRecord(
        key=stage.key,
        model=model_fields(stage.settings),
        class_names=source.class_names,
        template=source.template,
        preprocessing=clip.preprocessing,
        origin=clip.origin,
        metrics=metrics,
        backbone_sha256=backbone_sha256,
        made_of=stage.made_of,
    )


def model_fields(model: Model) -> dict[str, object]:
    """The fields of a model in teacher.pt."""
    return {"arch": model.arch, "config": model.config, "weights": model.weights}
