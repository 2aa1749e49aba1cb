"""Stage 2: a step by the reference procedure, with and without a cache, of the student alone, and in the loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.gpu.measure import Budget, Meter, flops
from comkd_cli.data.loaders import Batch
from comkd_cli.edge.images import Preprocessing
from comkd_cli.events import Epoch, Event
from comkd_cli.flows.distill.stage_2 import Distillation
from comkd_cli.method.objective import loss_terms
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import Teacher, TeacherOutput
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.recipe import Recipe, parse_recipe
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import Model
from comkd_cli.teachers.cached import CachedTeacher
from comkd_cli.teachers.feature_cache import CacheKey, TeacherCache
from comkd_cli.teachers.prompted import Prompted, prompted_clip
from comkd_cli.training.loop import Trainer
from comkd_cli.training.optimizer import make_optimizer
from comkd_cli.training.task import Task

FIRST_BATCH, MOST_BATCH = 8, 4096
LOOP_BATCHES = (8, 64)
COMPILE_SECONDS = 90.0
"""What a case with torch.compile takes, roughly."""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student with random weights."""

    teacher: Model
    student: Model
    trained: dict[str, Any]
    """What of the student is trained, as fields of a recipe's `student`."""
    optim: dict[str, Any]
    depth: int = 9
    """Prompted layers of both encoders of the teacher."""
    tokens: int = 4
    """Of each of these layers."""

    def recipe(self, batch: int, epochs: int = 1) -> Recipe:
        """The recipe for a batch size."""
        teacher, student = (model.model_dump(exclude_none=True) for model in (self.teacher, self.student))
        return parse_recipe(
            {
                "data": {"dataset": "digits"},
                "teacher": {**teacher, "adapt": {"method": "full"}},
                "student": {**student, "weights": "random", **self.trained},  # weights that are not loaded
                "optim": {**self.optim, "batch_size": batch, "epochs": epochs},
            }
        )

    def prompted(self) -> Prompted:
        """The teacher's CLIP with prompts."""
        return prompted_clip(build_clip(self.teacher), self.depth, self.depth, self.tokens)


class Setup:
    """The models of a pair with random weights, and its steps."""

    def __init__(self, pair: Pair, classes: int, accelerator: Accelerator) -> None:
        self.pair, self.device, self._accelerator = pair, accelerator.device, accelerator
        recipe = pair.recipe(FIRST_BATCH)
        self.prompted = pair.prompted()
        self.module = self.prompted.module.eval().to(self.device)
        names = [f"thing number {number}" for number in range(classes)]
        self.tokens = self.prompted.tokens(names).to(self.device)
        size = self.prompted.clip.preprocessing.size
        dim = self.module.encode_images(torch.zeros(1, 3, size, size, device=self.device)).shape[1]
        vectors = torch.nn.functional.normalize(torch.randn(classes, dim, device=self.device), dim=-1)
        self.teacher = Teacher(self.module.vision, vectors, self.module.logit_scale)
        self.student, self._preprocessing = self._new_student(recipe)
        self._optimizer = make_optimizer(self.student, recipe.optim, {})
        self._sizes = size, self._preprocessing.size

    def _new_student(self, recipe: Recipe) -> tuple[Student, Preprocessing]:
        """With a tower of its own: prompts are hooks on it."""
        tower, teacher = build_image_tower(self.pair.student), self.teacher
        attention = recipe.loss.edu_attention
        student = Student(
            tower.module, tower.width, teacher.class_vectors, teacher.logit_scale, recipe.student, attention
        )
        return student.to(self.device).train(), tower.preprocessing

    def compile(self) -> None:
        """Compile the towers, as `compile: true` does."""
        self.student.backbone.compile()
        self.teacher.image_tower.compile()

    def images(self, batch: int) -> tuple[Tensor, Tensor]:
        """Of the teacher's and of the student's size, on the CPU, in page-locked memory for a GPU."""
        made = [torch.randn(batch, 3, size, size) for size in self._sizes]
        first, second = (each.pin_memory() if self.device.type == "cuda" else each for each in made)
        return first, second

    def ways(self, batch: int, folder: Path) -> dict[str, Callable[[], None]]:
        """A step of each procedure on images that are on the device."""
        loss = self.pair.recipe(batch).loss
        for_teacher, for_student = (each.to(self.device) for each in self.images(batch))
        asked, warm = self._warm(batch, for_student, folder)

        def learn(answer: Callable[[], TeacherOutput]) -> None:
            with self._accelerator.autocast():
                terms = loss_terms(self.student(for_student), answer(), loss)
                total = torch.stack(list(terms.values())).sum()
            total.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

        @torch.no_grad()
        def reference() -> TeacherOutput:
            self.teacher.class_vectors.copy_(self.module.encode_classes(self.tokens))
            return self.teacher(for_teacher)

        with torch.no_grad():
            ready = self.teacher.answer(self.teacher.class_vectors[torch.arange(batch) % len(self.tokens)])
        return {
            "reference": lambda: learn(reference),
            "no_cache": lambda: learn(lambda: self.teacher(for_teacher)),
            "cache_warm": lambda: learn(lambda: asked(warm)),
            "student_only": lambda: learn(lambda: ready),
        }

    def _warm(self, batch: int, images: Tensor, folder: Path) -> tuple[CachedTeacher, Batch]:
        """A teacher whose features of a batch are all cached, and the batch."""
        indices = np.arange(batch)
        cache = TeacherCache(folder, CacheKey(f"{batch:064}", batch, self.teacher.class_vectors.shape[1], 1, "fp16"))
        features = torch.randn(batch, cache.key.dim)
        cache.put(0, indices, torch.nn.functional.normalize(features, dim=-1).numpy())
        cache.mark(0, indices)
        uncached = torch.zeros(batch, dtype=torch.bool)
        return CachedTeacher(self.teacher, cache), Batch(
            (torch.empty(0), images), None, torch.arange(batch), uncached=uncached
        )

    def loop(self, batch: int, steps: int, folder: Path) -> float:
        """Images per second of the training loop itself, which copies each batch to the device, with a warm cache."""
        recipe = self.pair.recipe(batch, epochs=2)
        _, images = self.images(batch)
        asked, warm = self._warm(batch, images, folder)
        student, preprocessing = self._new_student(recipe)
        objective = _Unscored(recipe, student, asked, None, preprocessing)  # type: ignore[arg-type]
        task = Task(
            model=student,
            objective=objective,
            loader=_Repeated(warm, batch, steps),
            optim=recipe.optim,
            folder=folder / "loop",
            identity=Identity({}),
            seed=1,
            label="student",
            resume_line="",
            unreadable_limit_percent=0.0,
        )
        rates: list[float] = []
        Trainer(task, self._accelerator, lambda event: _note_rate(event, rates)).fit()
        return rates[-1]


def _note_rate(event: Event, rates: list[float]) -> None:
    if isinstance(event, Epoch):
        rates.append(event.images_per_second)


class _Unscored(Distillation):
    def evaluate(self) -> dict[str, float]:
        """Nothing: there are no test images."""
        return {}


@dataclass(frozen=True)
class _Repeated:
    """A loader whose every step has the same images."""

    batch: Batch
    batch_size: int
    steps_per_epoch: int

    @property
    def image_count(self) -> int:
        return self.batch_size

    def epoch(self, _epoch: int, first_step: int = 0) -> Iterator[tuple[Batch]]:
        for _ in range(first_step, self.steps_per_epoch):
            yield (self.batch,)


def measure_steps(  # noqa: PLR0913 - the options of the command
    pair: Pair,
    classes: int,
    accelerator: Accelerator,
    meter: Meter,
    budget: Budget,
    most_batch: int,
    compiles: bool,
) -> dict[str, Any]:
    """Rates by batch size, from 8 to the largest that fits, doubling; then with compiled towers."""
    setup = Setup(pair, classes, accelerator)
    found: dict[str, Any] = {"batches": {}, "compiled": {}}
    batch = FIRST_BATCH
    while batch <= most_batch and budget.allows(f"batch {batch}", 8 * meter.seconds):
        with tempfile.TemporaryDirectory() as folder:
            ways = setup.ways(batch, Path(folder))
            if batch == FIRST_BATCH:
                arithmetic = {name: flops(way) / batch for name, way in ways.items()}
                found["flops_per_image"] = arithmetic
            else:
                ways.pop("reference")  # its arithmetic hardly depends on the batch
            rows = {name: _row(meter, way, batch, arithmetic[name]) for name, way in ways.items()}
            if batch in LOOP_BATCHES and (warm := rows["cache_warm"]) is not None:
                steps = max(2, int(meter.seconds * warm["images_per_second"] / batch))
                rows["loop"] = {"images_per_second": setup.loop(batch, steps, Path(folder))}
        found["batches"][batch] = _with_ratios(rows)
        if rows["student_only"] is None:
            break
        batch *= 2
    setup.student.zero_grad()
    fits = [size for size, rows in found["batches"].items() if rows.get("no_cache") is not None]
    if compiles and fits and budget.allows("compile", COMPILE_SECONDS):
        setup.compile()
        with tempfile.TemporaryDirectory() as folder:
            ways = setup.ways(min(64, max(fits)), Path(folder))
            found["compiled"] = {
                "batch": min(64, max(fits)),
                **{name: _row(meter, ways[name], min(64, max(fits)), arithmetic[name]) for name in _COMPILED},
            }
    return found


_COMPILED = ("no_cache", "cache_warm", "student_only")


def _row(meter: Meter, way: Callable[[], None], batch: int, flops_per_image: float) -> dict[str, Any] | None:
    found = meter.rate(way, batch)
    if found is None:
        return None
    return {**found, "share_of_bf16_peak": meter.share_of_peak(flops_per_image, found["images_per_second"])}


def _with_ratios(rows: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The rows, with their rates relative to the student's alone."""
    alone = rows["student_only"]
    if alone is None:
        return dict(rows)
    ratios = {
        name: row["images_per_second"] / alone["images_per_second"] for name, row in rows.items() if row is not None
    }
    return {**rows, "over_student_only": ratios}
