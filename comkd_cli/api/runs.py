"""`comkd distill` as a function, and the parts of a run that the command and the function share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from comkd_cli.api.folders import RUNS, PathLike, data_root_or_default
from comkd_cli.api.student import LoadedStudent, load_student
from comkd_cli.data.source import Source
from comkd_cli.data.sources import open_source
from comkd_cli.errors import MisuseError
from comkd_cli.events import Report, ignore_event
from comkd_cli.files import check_writable
from comkd_cli.flows import adapt
from comkd_cli.flows import distill as flow
from comkd_cli.models.checkpoints import load_student_record
from comkd_cli.recipe import Recipe, find_recipe, load_recipe, recipe_of
from comkd_cli.runtime import collectives
from comkd_cli.runtime.devices import failures_explained
from comkd_cli.training.accelerator import make_accelerator

RecipeLike = PathLike | Mapping[str, Any] | Recipe
"""A YAML file, the name of a bundled recipe, its fields as plain data (with `extends`, if wanted), or a Recipe."""
RESUME = "call distill again with the same arguments"


@dataclass(frozen=True)
class Distilled:
    """A finished run."""

    file: Path
    """Its student.pt."""
    recipe: Recipe
    """With every setting."""
    metrics: Mapping[str, float]
    """Of the epoch whose weights were saved, such as `test_top1_percent`."""
    was_finished: bool
    """Whether an earlier call had finished the run, so that nothing was trained."""

    @property
    def folder(self) -> Path:
        """RUNS/<recipe>/<dataset>/seed<k>, which also holds metrics.jsonl."""
        return self.file.parent

    def load(self, **options: Any) -> LoadedStudent:
        """The student; options: those of `load_student`."""
        return load_student(self.file, **options)


def distill(  # noqa: PLR0913 - each is a keyword of a public function
    recipe: RecipeLike,
    *,
    settings: Mapping[str, object] | None = None,
    name: str | None = None,
    runs: PathLike = RUNS,
    data_root: PathLike | None = None,
    fresh: bool = False,
    report: Report = ignore_event,
) -> Distilled:
    """Distil a teacher into a student as `comkd distill` does, in this process and on the device that it would use.

    settings: recipe fields to change, such as `{"optim.epochs": 10, "seed": 2}`. name: of the recipe's folder below
    `runs`; None: the name of its file, or `recipe`. data_root: folder of datasets; None: the commands' default. fresh:
    start from scratch, discarding an existing run. report: called with each event. An interrupted run is resumed by the
    same call; a finished one is not repeated. Raises ComkdError: RecipeError for a faulty recipe, DataError and
    ModelError for images and weights that cannot be used, CheckpointError for a finished run with other settings,
    Interrupted after a signal, with a checkpoint saved.
    """
    found = _recipe(recipe, settings or {})
    place = Place(name or _name(recipe), Path(runs), data_root_or_default(data_root))
    collectives.set_timeout(found.collective_timeout_minutes)
    accelerator = make_accelerator(found.precision)
    run, stage = place.prepare(found, report)
    was_finished = not fresh and flow.finished(run, report)
    if was_finished:
        flow.remove_leftovers(run)
    else:
        for folder in (run.folder, stage.folder) if stage.adapts else (run.folder,):
            collectives.in_turn(partial(check_writable, folder, "choose another folder for runs"))
        with failures_explained():
            teacher = adapt.TeacherPreparation(stage, accelerator, report, RESUME)
            flow.distill(run, teacher, accelerator, report, RESUME, fresh)
    return Distilled(run.student_file, found, load_student_record(run.student_file).metrics, was_finished)


@dataclass(frozen=True)
class Place:
    """Where the runs of a recipe are."""

    name: str
    """Of the recipe."""
    runs: Path
    data_root: Path

    def prepare(self, recipe: Recipe, report: Report) -> tuple[flow.Run, adapt.Stage1]:
        """A run with the contents of its images read, and the stage that makes its teacher.

        Remote shards that are missing are fetched, which runs the command of a `pipe:`. Raises DataError.
        """
        open_images = partial(open_source, recipe.data, self.data_root, self.runs, report, fetch=True)
        source: Source = collectives.in_turn(open_images)
        stage = collectives.in_turn(partial(adapt.stage_1, recipe, source, self.data_root, self.runs, report))
        with collectives.without_timeout():  # reading the contents of many images takes long
            images = flow.training_source(recipe, source)
            run = flow.Run(recipe, self.name, images, self.runs, stage.contents, stage.key)
            run.identity.digest  # noqa: B018 - reads the contents, which are kept from then on
        return run, stage


def _recipe(recipe: RecipeLike, settings: Mapping[str, object]) -> Recipe:
    texts = [f"{field}={_yaml(field, value)}" for field, value in settings.items()]
    if isinstance(recipe, Recipe):
        return recipe_of(recipe.model_dump(mode="json"), texts)
    return recipe_of(recipe, texts) if isinstance(recipe, Mapping) else load_recipe(os.fspath(recipe), texts)


def _yaml(field: str, value: object) -> str:
    """A value as text, as on the command line: JSON is YAML. Raises MisuseError."""
    try:
        return json.dumps(value, default=os.fspath)
    except (TypeError, ValueError) as error:  # an object, such as a number of numpy; a list that holds itself
        raise MisuseError("is not plain data", field=field, found=repr(value)) from error


def _name(recipe: RecipeLike) -> str:
    return "recipe" if isinstance(recipe, Recipe | Mapping) else find_recipe(os.fspath(recipe)).stem
