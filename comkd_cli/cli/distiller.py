"""Makes distillation runs for the commands: each from its images to student.pt, resumed where it was stopped."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from comkd_cli.cli.resuming import Choice, StoppedRun

if TYPE_CHECKING:
    from accelerate import Accelerator

    from comkd_cli.flows.adapt import Stage1
    from comkd_cli.flows.distill import Run
    from comkd_cli.recipe import Recipe

ANOTHER_FOLDER = "choose another folder with --runs"


def accelerator_of(recipes: Sequence[Recipe]) -> Accelerator:
    """What the runs of one command compute on. Raises MisuseError for runs of several precisions, TrainingError."""
    from comkd_cli.errors import MisuseError
    from comkd_cli.runtime import collectives
    from comkd_cli.training.accelerator import make_accelerator

    if len(precisions := sorted({recipe.precision for recipe in recipes})) > 1:
        raise MisuseError(f"the datasets differ in precision ({', '.join(precisions)}); run them one at a time")
    collectives.set_timeout(max(recipe.collective_timeout_minutes for recipe in recipes))
    return make_accelerator(recipes[0].precision)


class Distiller:
    """Makes the runs of one command, one after another."""

    precompute = False
    """Fill the teacher cache instead of training students."""
    offers_fresh = True
    """Whether the command has --fresh."""

    def __init__(self, name: str, runs: Path, data_root: Path, accelerator: Accelerator) -> None:
        """name: of the recipe."""
        self._name, self._runs, self._data_root = name, runs, data_root
        self._accelerator = accelerator
        self._reported: set[str] = set()  # notices about a dataset, which the run of each seed would repeat

    def make_all(self, recipes: Sequence[Recipe], choices: Sequence[Choice], fresh: bool) -> None:
        """Make a run for each recipe. If there are several, one that fails does not stop the others.

        choices: the dataset and seed of each recipe. fresh: discard existing runs. Raises DataError after the last
        run if some of several failed, and the error of a run that is the only one.
        """
        from comkd_cli.cli.terminal import messages
        from comkd_cli.errors import CheckpointError, DataError, InUseError, ModelError
        from comkd_cli.files import check_writable
        from comkd_cli.runtime import collectives

        collectives.in_turn(partial(check_writable, self._runs, ANOTHER_FOLDER))
        failed = 0
        for position, recipe in enumerate(recipes):
            try:
                student = self.make(recipe, StoppedRun(choices, position, fresh))
            except (DataError, CheckpointError, InUseError, ModelError) as error:
                if len(recipes) == 1:
                    raise
                messages().print(f"failed: {error}", style="yellow", markup=False)
                failed += 1
                continue
            if student is not None:
                _print_next_steps(student)
        if failed:
            raise DataError(f"{failed} of {len(recipes)} runs failed; see the errors above")

    def make(self, recipe: Recipe, resume: StoppedRun) -> Path | None:
        """One run. Returns its student.pt; None if it was already finished, or only the cache was filled."""
        from comkd_cli.errors import Interrupted

        try:
            prepared = self._prepare(recipe, resume)
            return None if prepared is None else self._train(*prepared, resume)
        except KeyboardInterrupt:
            if not resume.fresh:
                raise  # the same command resumes the run
            raise Interrupted(f"interrupted. To resume:\n  {resume.resume_teacher}") from None

    def _prepare(self, recipe: Recipe, resume: StoppedRun) -> tuple[Run, Stage1] | None:
        """The run and its teacher; None if its student is already finished."""
        from comkd_cli.api.runs import Place
        from comkd_cli.cli.terminal import messages, reporting
        from comkd_cli.events import once
        from comkd_cli.files import check_writable
        from comkd_cli.flows import distill
        from comkd_cli.runtime import collectives

        with reporting() as shown:
            report = once(shown, self._reported)
            run, stage = Place(self._name, self._runs, self._data_root).prepare(recipe, report)
            finished = not self.precompute and not resume.fresh and distill.finished(run, report, resume.alone)
        if finished:
            distill.remove_leftovers(run)
            hint = " (--fresh repeats it)" if self.offers_fresh else ""
            messages().print(f"already finished: {run.student_file}{hint}", markup=False)
            return None
        for folder in (run.folder, stage.folder) if stage.adapts else (run.folder,):
            collectives.in_turn(partial(check_writable, folder, ANOTHER_FOLDER))
        return run, stage

    def _train(self, run: Run, stage: Stage1, resume: StoppedRun) -> Path | None:
        from comkd_cli.cli.terminal import reporting
        from comkd_cli.flows import adapt, distill
        from comkd_cli.runtime.devices import failures_explained

        with reporting() as report, failures_explained():
            teacher = adapt.TeacherPreparation(stage, self._accelerator, report, resume.resume_teacher)
            if self.precompute:
                distill.precompute(run, teacher, self._accelerator, report)
                return None
            return distill.distill(run, teacher, self._accelerator, report, resume.resume_student, resume.fresh)


def _print_next_steps(student: Path) -> None:
    from comkd_cli.cli.terminal import output

    path = shlex.quote(str(student))
    output().print(
        f"student: {student}\n  comkd evaluate {path}\n  comkd export --onnx {path}",
        markup=False,
        soft_wrap=True,
    )
