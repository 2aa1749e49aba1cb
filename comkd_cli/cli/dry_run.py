"""The plan that `comkd distill --dry-run` prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from comkd_cli.runtime import ranks

if TYPE_CHECKING:
    from comkd_cli.data.source import Source
    from comkd_cli.events import Report
    from comkd_cli.flows.adapt import Stage1
    from comkd_cli.flows.distill import Outline, Run
    from comkd_cli.recipe import Recipe

ROWS = (
    "images",
    "teacher",
    "stage 1",
    "teacher check",
    "student",
    "stage 2",
    "cache",
    "copies",
    "device",
    "writes",
    "state",
)


class DryRun:
    """Prints the plans of a command's runs; trains nothing and downloads no weights."""

    def __init__(self, name: str, runs: Path, data_root: Path, device: str) -> None:
        """name: of the recipe. device: its type, such as `cuda`."""
        self._name, self._runs, self._data_root, self._device = name, runs, data_root, device
        self._reported: set[str] = set()  # notices about a dataset, which the run of each seed would repeat

    def print(self, recipe: Recipe) -> None:
        """Print the plan of one run. If its images are missing, the table says so and still describes the models."""
        from comkd_cli.cli.terminal import print_pairs, reporting
        from comkd_cli.data.sources import open_source
        from comkd_cli.errors import DataError
        from comkd_cli.events import once
        from comkd_cli.flows import distill
        from comkd_cli.recipe.catalog import CATALOG
        from comkd_cli.runtime import collectives

        rows: dict[str, str] = {}
        with reporting() as shown:
            report = once(shown, self._reported)
            try:
                open_images = partial(open_source, recipe.data, self._data_root, self._runs, report)
                source = collectives.in_turn(open_images)
            except DataError as error:
                dataset = CATALOG.get(recipe.data.dataset or "")
                outline = distill.outline(recipe, dataset.classes if dataset else 1)  # classes add no parameters
                rows["images"] = f"{error}; {dataset.classes} classes" if dataset else str(error)
            else:
                outline = distill.outline(recipe, len(source.class_names))
                rows |= self._data_rows(recipe, source, outline, report)
        rows |= _model_rows(outline)
        processes = f", {ranks.world_size()} processes" if ranks.world_size() > 1 else ""
        rows["device"] = f"{self._device}, {recipe.precision}{processes}"
        print_pairs({row: rows[row] for row in ROWS if row in rows})

    def _data_rows(self, recipe: Recipe, source: Source, outline: Outline, report: Report) -> dict[str, str]:
        """The rows that depend on the images."""
        from comkd_cli.data.copies import FOLDER
        from comkd_cli.errors import DataError
        from comkd_cli.flows import adapt, distill
        from comkd_cli.teachers.feature_cache import CacheKey

        drawn = distill.training_source(recipe, source)
        train, test = len(drawn.train), len(source.test) if source.test else 0
        labelled = drawn.train.labelled_count
        some = f" ({labelled:,} with a label)" if 0 < labelled < train else ""
        images = f"{train:,} training images{some}, {test:,} {source.test_name}"
        rows = {"images": f"{source.name}: {images}, {outline.classes} classes"}
        if cache := recipe.teacher_cache:
            key = CacheKey("", train, outline.teacher_dim, cache.views, cache.dtype)
            rows["cache"] = f"{cache.views} crops of each image, {key.size_bytes / 1e6:,.1f} MB when full"
        try:
            stage = adapt.stage_1(recipe, source, self._data_root, self._runs, report)
        except DataError as error:  # in the data that the teacher is adapted on
            return {**rows, "stage 1": str(error)}
        rows["stage 1"] = adapt.describe_stage(stage)
        run = distill.Run(recipe, self._name, drawn, self._runs, stage.contents, stage.key)
        plan = distill.plan(run)
        if run.copy_plan is not None:
            rows["copies"] = run.copy_plan.text(len(run.source.train), self._runs / FOLDER)
        rows["teacher check"] = self._teacher_check(run, stage, report)
        steps = recipe.optim.epochs * plan.steps_per_epoch
        rows["stage 2"] = f"{recipe.optim.epochs} epochs of {plan.steps_per_epoch:,} steps, {steps:,} in all"
        return {**rows, "writes": str(plan.folder), "state": plan.state}

    def _teacher_check(self, run: Run, stage: Stage1, report: Report) -> str:
        """The teacher's answers on some training images, and a notice for each finding; or why it was not checked."""
        from comkd_cli.events import Notice
        from comkd_cli.flows import distill

        saved = stage.file if stage.adapts else None
        found = distill.preview_teacher(run, saved, self._device, report)
        if isinstance(found, str):
            return f"not checked: {found}"
        for finding in found.findings:
            report(Notice(finding.line))
        return found.line


def _model_rows(outline: Outline) -> dict[str, str]:
    smaller = outline.teacher_image_tower_parameters / outline.student_image_tower_parameters
    cheaper = outline.teacher_multiply_adds / outline.student_multiply_adds
    trainable = outline.student_trainable_parameters / outline.student_image_tower_parameters
    return {
        "teacher": (
            f"{outline.teacher_parameters:,} parameters; image tower {outline.teacher_image_tower_parameters:,}, "
            f"{outline.teacher_multiply_adds / 1e9:.3g} G multiply-adds per image"
        ),
        "student": (
            f"image tower {outline.student_image_tower_parameters:,} parameters, 1/{smaller:.1f} of the teacher's; "
            f"{outline.student_multiply_adds / 1e9:.3g} G multiply-adds per image, 1/{cheaper:.1f}; "
            f"{outline.student_trainable_parameters:,} trainable ({trainable:.1%})"
        ),
    }
