"""The runs of a protocol: planned with their time and disk space, made, scored, and compared with published figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from comkd_cli.cli.distiller import ANOTHER_FOLDER, Distiller
from comkd_cli.cli.resuming import Choice, ReproducedRun

if TYPE_CHECKING:
    from accelerate import Accelerator

    from comkd_cli.data.source import Source
    from comkd_cli.events import Report
    from comkd_cli.flows.adapt import Stage1
    from comkd_cli.flows.distill import Run
    from comkd_cli.flows.estimate import Costs, Load
    from comkd_cli.recipe import Recipe
    from comkd_cli.results.comparison import Comparison, Method, Protocol
    from comkd_cli.results.records import Record

FOLDER = "reproduce"


@dataclass(frozen=True)
class Goal:
    """What is reproduced, and by which recipe."""

    protocol: Protocol
    method: Method
    recipe: str
    """Its name or file, as it was typed."""
    settings: tuple[str, ...]
    """For every run, as `--set` accepts them."""
    name: str
    """Of the recipe, and of the folder of its runs."""


@dataclass
class Item:
    """One run of a reproduction: a dataset and a seed."""

    choice: Choice
    recipe: Recipe
    student: Path | None = None
    """Its student.pt; None if its images could not be opened."""
    load: Load | None = None
    """What is left to do; None for a run that is finished or cannot be made."""
    problem: str | None = None
    """Why it has no score."""
    is_absent: bool = False
    """Whether the images do not exist, which is a row and no failure."""
    records: Sequence[Record] = ()

    @property
    def dataset(self) -> str:
        """Its name."""
        return str(self.choice.dataset)

    @property
    def state(self) -> str:
        """For the plan; empty if something is left to do."""
        if self.problem is not None:
            return "missing" if self.is_absent else "failed"
        return "" if self.load is not None else "scored" if self.records else "trained"


@dataclass
class Reproduction:
    """Plans, makes, scores and compares the runs of one protocol."""

    goal: Goal
    runs: Path
    data_root: Path
    accelerator: Accelerator
    as_json: bool
    """Whether standard output is for a JSON document only."""
    items: list[Item] = field(default_factory=list)
    _reported: set[str] = field(default_factory=set)  # notices about a dataset, which the run of each seed would repeat
    _teachers: set[Path] = field(default_factory=set)  # folders of those that an earlier run of the plan trains
    _largest: tuple[int, Source | None] = (0, None)  # the most classes of a teacher, and images to decode

    def plan(self, choices: Sequence[Choice], recipes: Sequence[Recipe]) -> None:
        """Look at every run, measure a step if anything is left to do, and print the plan."""
        from comkd_cli.cli.terminal import reporting
        from comkd_cli.events import Stage, once
        from comkd_cli.flows.estimate import measure
        from comkd_cli.runtime.devices import failures_explained

        self.items = [Item(*pair) for pair in zip(choices, recipes, strict=True)]
        costs = None
        with reporting() as shown:
            report = once(shown, self._reported)
            for item in self.items:
                self._look_at(item, report)
            if unfinished := [item for item in self.items if item.load is not None]:
                report(Stage("Measuring a step of each stage, with random weights"))
                classes, source = self._largest
                images = None if source is None else source.train
                with failures_explained():
                    costs = measure(unfinished[0].recipe, classes, images, self.accelerator)
        if not self.as_json:
            self._print_plan(costs)

    def _look_at(self, item: Item, report: Report) -> None:
        """Find out what is left of a run, or why it cannot be made."""
        from comkd_cli.data.sources import open_source
        from comkd_cli.errors import DataError
        from comkd_cli.flows import adapt, distill
        from comkd_cli.recipe.catalog import CATALOG
        from comkd_cli.runtime import collectives

        recipe, root = item.recipe, self.data_root
        item.is_absent = not (root / CATALOG[item.dataset].folder).is_dir()
        try:
            source = collectives.in_turn(partial(open_source, recipe.data, root, self.runs, report))
            run = distill.Run(recipe, self.goal.name, distill.training_source(recipe, source), self.runs, {})
            item.student = run.student_file
            if item.student.exists():
                item.records = self._kept_records(item.student, source)
                return
            run.check_images()
            stage = collectives.in_turn(partial(adapt.stage_1, recipe, source, root, self.runs, report))
            item.load = self._load(run, stage)
        except DataError as error:
            item.problem = str(error)

    def _kept_records(self, student: Path, source: Source) -> Sequence[Record]:
        """The records of an earlier scoring of this student on these images; none if there was none."""
        from comkd_cli.files import sha256_of_file
        from comkd_cli.results.result_files import read_results

        own = [record for record in read_results(student.parent).records if record.protocol == self.goal.protocol]
        scored = [record for record in own if record.model == str(student)]
        if not scored or source.test is None:
            return ()
        made_of = (sha256_of_file(student), source.test.digest)
        current = all((record.model_sha256, record.images_sha256) == made_of for record in scored)
        return own if current else ()

    def _load(self, run: Run, stage: Stage1) -> Load:
        """What is left of a run whose student does not exist. Raises DataError if its teacher lacks labels."""
        from comkd_cli.flows.estimate import Load
        from comkd_cli.recipe.model import FullAdapt, PromptSrcAdapt

        adapt, source, classes, steps, scored = stage.settings.adapt, run.source, len(run.source.class_names), 0, 0
        if isinstance(adapt, PromptSrcAdapt | FullAdapt) and stage.folder not in self._teachers:
            self._teachers.add(stage.folder)
            own = stage.prompt_source(adapt) if isinstance(adapt, PromptSrcAdapt) else stage.adaptation_source
            classes = len(own.class_names)
            if not stage.file.is_file():
                epochs = _epochs_left(stage.folder, adapt.epochs)
                steps = epochs * (len(own.train) // min(adapt.batch_size, len(own.train)))
                scored = _times_scored(epochs, run.recipe) * len(own.test or ())
        if classes > self._largest[0]:
            self._largest = (classes, source)
        epochs, test = _epochs_left(run.folder, run.recipe.optim.epochs), len(source.test or ())
        return Load(
            classes=classes,
            teacher_steps=steps,
            teacher_scored=scored,
            student_steps=epochs * (len(source.train) // run.batch_size),
            student_scored=_times_scored(epochs, run.recipe) * test,
            evaluated=test,
            train=len(source.train),
        )

    def _print_plan(self, costs: Costs | None) -> None:
        """A row for each run, and the sum of their time and disk space."""
        from comkd_cli.cli.terminal import Column, output, print_table
        from comkd_cli.data.loaders import worker_count

        device, seconds, size = self.accelerator.device.type, 0.0, 0
        rows, caches = [], {}
        for item in self.items:
            cells = ["", "", item.state]
            if item.load is not None and costs is not None:
                own = costs.seconds(item.recipe, item.load, device, worker_count(item.recipe.data))
                seconds, size = seconds + own, size + costs.kept_bytes(item.load)
                caches[item.dataset] = costs.cache_bytes(item.recipe, item.load)
                steps = item.load.teacher_steps + item.load.student_steps
                cells = [f"{item.load.train:,}", f"{steps:,}", f"about {duration(own)}"]
            rows.append((item.dataset, str(item.choice.seed), *cells))
        columns = [Column("data", "word"), *map(Column, ("seed", "images", "steps")), Column("state", "text")]
        print_table(columns, rows, f"{self.goal.protocol}, {self.goal.method}: what is left to do")
        if costs is not None:
            size += sum(caches.values()) + costs.checkpoint_bytes
            output().print(
                f"In total about {duration(seconds)} on this machine ({device}) and {size / 1e6:,.1f} MB in "
                f"{self.runs}, not counting downloaded weights. {costs.line}",
                markup=False,
                soft_wrap=True,
            )

    def make(self) -> None:
        """Make and score each run that the plan found images for. A run that fails does not stop the others."""
        from comkd_cli.cli.terminal import messages
        from comkd_cli.errors import CheckpointError, DataError, ModelError
        from comkd_cli.files import check_writable
        from comkd_cli.runtime import collectives

        collectives.in_turn(partial(check_writable, self.runs, ANOTHER_FOLDER))
        distiller = Distiller(self.goal.name, self.runs, self.data_root, self.accelerator)
        distiller.offers_fresh = False
        choices = [item.choice for item in self.items]
        for position, item in enumerate(self.items):
            if item.student is None or item.problem is not None:
                continue
            try:
                distiller.make(item.recipe, ReproducedRun(choices, position, False, self._distill_words(item)))
                item.records = item.records or self._scores(item)
            except (DataError, CheckpointError, ModelError) as error:
                messages().print(f"failed: {error}", style="yellow", markup=False)
                item.problem = str(error)

    def _distill_words(self, item: Item) -> list[str]:
        """The words of the `comkd distill` that makes the same run."""
        settings = [word for setting in self.goal.settings for word in ("--set", setting)]
        own = f"--dataset {item.dataset} --seed {item.choice.seed}".split()
        folders = ["--runs", str(self.runs), "--data-root", str(self.data_root)]
        return ["distill", self.goal.recipe, *own, *settings, *folders]

    def _scores(self, item: Item) -> Sequence[Record]:
        """The scores of a student and its teacher, which are also added to the results.json beside the student."""
        from comkd_cli.cli.terminal import reporting
        from comkd_cli.events import once
        from comkd_cli.flows import evaluate
        from comkd_cli.results.records import Results
        from comkd_cli.results.result_files import ResultFiles
        from comkd_cli.runtime import ranks

        assert item.student is not None  # make checked it
        with reporting() as shown:
            report = once(shown, self._reported)
            files = ResultFiles(item.student.parent, report)

            def keep(found: Results) -> None:
                if ranks.is_main():
                    files.add(found)

            bench = evaluate.Bench(
                self.accelerator.device,
                self.data_root,
                report,
                features=self.runs / "features",
                protocols=(self.goal.protocol,),
                protocols_named=True,
            )
            results = evaluate.evaluate(str(item.student), self.runs, bench, keep)
        if files.problem is not None:
            raise files.problem
        if results.missing:
            item.problem = "; ".join(entry.line for entry in results.missing)
        return results.records

    def finish(self, write: bool) -> None:
        """Print the published tables beside ours, and with `write` keep them in RUNS/reproduce.

        Raises DataError if a run failed, or none could be scored.
        """
        from comkd_cli.cli.terminal import Column, output, print_json, print_table
        from comkd_cli.errors import DataError
        from comkd_cli.results.comparison import compare, table_of

        goal, datasets = self.goal, list(dict.fromkeys(item.dataset for item in self.items))
        records = [record for item in self.items for record in item.records]
        unique = list({record.identity: record for record in records}.values())  # seeds share a teacher
        comparisons = compare(goal.protocol, goal.method, unique, datasets, self._reasons())
        plain = {"protocol": goal.protocol, "method": goal.method, "recipe": goal.recipe, "settings": goal.settings}
        document = {**plain, "comparisons": [each.as_plain() for each in comparisons]}
        if self.as_json:
            print_json(document)
        for each in [] if self.as_json else comparisons:
            table = table_of(each)
            columns = [Column(head, "figure" if table.is_figures(head) else "text") for head in table.heads]
            print_table(columns, table.rows, table.title, table.note)
        if write:
            path = self._write(comparisons, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
            if not self.as_json:
                output().print(
                    f"tables written to {path} and, as JSON, to {path.with_suffix('.json')}", style="dim", markup=False
                )
        failed = [item for item in self.items if item.problem is not None and not item.is_absent]
        if write and failed:
            lines = [f"{item.dataset}, seed {item.choice.seed}: {item.problem}" for item in failed]
            raise DataError("\n  ".join([f"{len(failed)} of {len(self.items)} runs failed", *lines]))
        if write and not records:
            raise DataError("holds none of the protocol's datasets", path=self.data_root, remedy="set --data-root")

    def _reasons(self) -> dict[str, str]:
        """Why a dataset has no figures of ours, or not those of every seed."""
        reasons = {}
        for dataset in dict.fromkeys(item.dataset for item in self.items):
            own = [item for item in self.items if item.dataset == dataset]
            problems = {item.choice.seed: item.problem for item in own if item.problem is not None}
            if len(set(problems.values())) == 1 and len(problems) == len(own):
                reasons[dataset] = next(iter(problems.values()))
            elif problems:
                reasons[dataset] = "; ".join(f"seed {seed}: {problem}" for seed, problem in problems.items())
        return reasons

    def _write(self, comparisons: Sequence[Comparison], document: str) -> Path:
        """Write the tables to RUNS/reproduce, and return the path of the Markdown file."""
        from comkd_cli.files import write_text
        from comkd_cli.results.comparison import table_of
        from comkd_cli.results.tables import table_as_markdown
        from comkd_cli.runtime import ranks

        path = self.runs / FOLDER / f"{self.goal.protocol}-{self.goal.method}-{self.goal.name}.md"
        if ranks.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "\n".join(table_as_markdown(table_of(each)) for each in comparisons))
            write_text(path.with_suffix(".json"), document)
        return path


def _epochs_left(folder: Path, epochs: int) -> int:
    """The epochs that a run has left, by its checkpoint and its curve."""
    from comkd_cli.results.curve import read_curve
    from comkd_cli.training.checkpoint import checkpoint_file

    return epochs - len(read_curve(folder)) if checkpoint_file(folder).is_file() else epochs


def _times_scored(epochs: int, recipe: Recipe) -> int:
    """How often the test images are scored in this number of epochs."""
    every = 1 if recipe.selection == "promptkd" else recipe.evaluate_every_epochs
    return max(1, epochs // every) if every else 1


def duration(seconds: float) -> str:
    """The two largest units of a time, such as `3 d 4 h`."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = max(1, round(seconds)), []
    for unit, size in units:
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])
