"""One distillation run: what decides its student, where its files are, and what is refused before training."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from comkd_cli.data.copy_plan import CopyPlan, plan_copies, with_copies
from comkd_cli.data.loaders import check_shares
from comkd_cli.data.source import ImageSet, Source
from comkd_cli.data.splits import draw_shots
from comkd_cli.errors import CheckpointError, DataError, ModelError
from comkd_cli.events import Notice, Report, ignore_event
from comkd_cli.files import sha256_of_data
from comkd_cli.method.objective import labels_missing
from comkd_cli.models.backbones import weights_sha256
from comkd_cli.models.checkpoints import StudentRecord, load_student_record
from comkd_cli.models.input_size import input_size
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.identity import Identity, described, recipe_settings
from comkd_cli.recipe.model import PromptSrcAdapt
from comkd_cli.results.tables import VARIANTS
from comkd_cli.runtime import collectives


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
    """Only of the teacher; students of other classes can share its cached image features."""

    @property
    def folder(self) -> Path:
        """runs/<recipe>/<dataset>/seed<k>."""
        return self.runs / self.name / self.source.name / f"seed{self.recipe.seed}"

    @property
    def student_file(self) -> Path:
        """The finished student."""
        return self.folder / "student.pt"

    @property
    def batch_size(self) -> int:
        """The recipe's, or the number of training images if these are fewer."""
        return min(self.recipe.optim.batch_size, len(self.source.train))

    @cached_property
    def copy_plan(self) -> CopyPlan | None:
        """The copies that teacher and student see crops of; None if they see crops of the images."""
        recipe = self.recipe

        def larger_input() -> int:
            return max(input_size(recipe.teacher), input_size(recipe.student))

        return plan_copies(self.source.train, recipe.data, larger_input, recipe.augment.min_scale)

    def images_to_crop(self, report: Report) -> ImageSet:
        """The training images, with their copies if the run uses some, which is reported."""
        return with_copies(self.source.train, self.copy_plan, self.recipe.data, self.runs, report)

    @cached_property
    def identity(self) -> Identity:
        """All that decides the student. Reads the images whose contents are not in the index."""
        recipe, test = self.recipe, self.source.test
        student = {"weights_sha256": weights_sha256(recipe.student)}
        data: dict[str, Any] = {"fingerprint": recipe.data.fingerprint, **self.source.identity()}
        if self.source.holdout is not None:
            data["holdout_percent"] = self.source.holdout.percent
        if self.copy_plan is not None:
            data["resized"] = self.copy_plan.short_side
        if recipe.selection == "promptkd" and test is not None:
            labels = None if test.labels is None else sha256_of_data(list(test.labels))
            data |= {
                "test_images": test.digest,
                "test_labels": labels,
                # It depends on whether teacher.adapt.data is the recipe's own data, which no compared setting records.
                "selection_classes": selection_classes(recipe),
            }
        parts = {"recipe": recipe_settings(recipe), "data": data, "student": student, "teacher": dict(self.teacher)}
        return Identity(parts)

    def check_images(self) -> None:
        """Raise DataError if there are too few training images, or they lack the labels that the loss needs."""
        images = self.source.train
        if len(images) < 2:
            raise DataError("distillation needs at least 2 training images", path=self.source.name, found=len(images))
        if self.recipe.loss.labels is not None and images.labels is None:
            raise labels_missing(self.source.name)

    def check_selection(self) -> None:
        """Raise DataError if an epoch would be selected on test images without labels."""
        test = self.source.test
        if selection_classes(self.recipe) and (test is None or not test.labels):
            raise DataError(
                "needs labelled test images",
                path=self.source.name,
                field="selection",
                found=self.recipe.selection,
                remedy="use selection: last",
            )

    def check_start(self) -> None:
        """Raise ModelError if the student starts from the file that the run itself writes, or is a released one."""
        if self.recipe.student.format == "promptkd":
            raise ModelError(
                "comkd distill does not train a student in this format",
                field="student.format",
                found=self.recipe.student.format,
                remedy="convert it to a student.pt with `comkd import-student`, then set student.weights to that file "
                "and remove student.format",
            )
        weights = self.recipe.student.weights
        if weights is not None and Path(weights).expanduser().resolve() == self.student_file.resolve():
            raise ModelError(
                "is the file that this run writes",
                path=self.student_file,
                field="student.weights",
                remedy="move the folder of the earlier run, then set student.weights to the new path of the file",
            )

    def check_steps(self) -> None:
        """Raise TrainingError if a step has fewer images than processes and parts of a batch to share them."""
        check_shares(self.batch_size, self.recipe.optim.accumulation_steps)


def training_source(recipe: Recipe, source: Source) -> Source:
    """The source with the images that the student is trained on: all, or with `student.shots` those of a draw.

    The draw is that of Dassl from all labelled training images (data/splits.py). Raises DataError if none have a
    label.
    """
    shots = recipe.student.shots
    if shots is None:
        return source
    labelled = source.train.labelled
    if not len(labelled) or labelled.labels is None:
        raise DataError(
            "drawing images of each class requires labels, but the training images have none",
            path=source.name,
            field="student.shots",
            found=shots,
            remedy="set it to null",
        )
    val = source.val.labels or () if source.val else ()
    drawn, _ = draw_shots(labelled.labels, val, shots, recipe.seed)
    return replace(source, train=labelled.subset(drawn))


def finished(run: Run, report: Report = ignore_event, command: str = "comkd distill RECIPE") -> bool:
    """Whether the run's student exists. Raises CheckpointError, naming what differs, if it is another run's.

    command: the command line of this run alone, without --fresh, for the remedy.
    """
    if not collectives.broadcast(run.student_file.exists()):
        return False
    record = load_student_record(run.student_file)
    if differences := run.identity.differences(record.identity_parts or _parts_of_old(record), "the finished run"):
        raise CheckpointError(
            "was made with different settings or images",
            path=run.student_file,
            found=described(differences),
            remedy=_remedy(run, record, differences, command),
        )
    if record.identity_parts is None:
        report(
            Notice(
                f"{run.student_file}: was made by a version of comkd that did not record image contents; the settings "
                "are the same, but the images and the teacher could not be compared; --fresh repeats the run"
            )
        )
    return True


def _remedy(run: Run, record: StudentRecord, differences: list[str], command: str) -> str:
    """What to do about a finished run that differs; more epochs can start from its weights."""
    epochs = record.recipe.optim.epochs
    if epochs >= run.recipe.optim.epochs or any(line.startswith("student.") for line in differences):
        return "replace it with --fresh, or keep both with another --runs folder"
    # Not `seedK`, or it would count as another seed of the recipe.
    kept = run.folder.with_name(f"epochs{epochs}-{run.folder.name}")
    setting = shlex.quote(f"student.weights={kept / run.student_file.name}")
    return (
        "a finished run cannot be extended. To train a new run from its weights:\n"
        f"  mv {shlex.quote(str(run.folder))} {shlex.quote(str(kept))}\n"
        f"  {command} --set {setting}\n"
        "To repeat it with all epochs:\n"
        f"  {command} --fresh"
    )


def _parts_of_old(record: StudentRecord) -> dict[str, Any]:
    """The identity parts that a student.pt without recorded parts has: settings, class names and prompt."""
    names = {"class_names": list(record.class_names), "template": record.template}
    return {"recipe": recipe_settings(record.recipe), "data": names}


def selection_classes(recipe: Recipe) -> Literal["all", "base"] | None:
    """The classes whose test images select the epoch; None keeps the last epoch.

    PromptKD's validation split is its test split: that of the base classes if the teacher was trained on these alone
    (base-to-novel), that of all classes if it was trained on another dataset (cross-dataset, domain generalisation).
    """
    if recipe.selection == "last":
        return None
    if recipe.selection_classes is not None:
        return recipe.selection_classes
    adapt = recipe.teacher.adapt
    if not isinstance(adapt, PromptSrcAdapt) or adapt.classes == "all" or recipe.data.dataset in VARIANTS:
        return "all"
    own, of_teacher = recipe.data, adapt.data or recipe.data
    # Where the images are, not how they are decoded.
    same = (own.dataset, own.folder, own.shards) == (of_teacher.dataset, of_teacher.folder, of_teacher.shards)
    return "base" if same else "all"
