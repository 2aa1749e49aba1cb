"""How long runs will take on this machine, and how much disk, from steps that are measured on models without weights.

Nothing is downloaded: a step takes the same time with any weights.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from comkd_cli.data.source import ImageSet
from comkd_cli.data.transforms import training_inputs
from comkd_cli.edge.images import Preprocessing, UnreadableImage
from comkd_cli.method import teacher as method
from comkd_cli.method.objective import loss_terms
from comkd_cli.method.prompt_src import prompt_src_terms
from comkd_cli.method.student import Student
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.recipe import Recipe
from comkd_cli.recipe.model import FullAdapt, Model, PromptSrcAdapt
from comkd_cli.runtime import ranks
from comkd_cli.teachers.prompted import prompted_clip

REPEATS = 2  # the first step allocates memory and chooses kernels
FEW_CLASSES = (4, 12)  # on a CPU, where a step takes a class's time for each class
DECODED_IMAGES = 8
BYTES = 4  # of a float32
STATES = 2  # of a checkpoint: the learned tensors, and the optimizer's momentum of each


@dataclass(frozen=True)
class Load:
    """What one run has left to do."""

    classes: int
    teacher_steps: int
    teacher_scored: int
    """Images that the teacher is scored on while it is trained, all epochs together."""
    student_steps: int
    student_scored: int
    """Images that the student is scored on while it is trained, all epochs together."""
    evaluated: int
    """Images that student and teacher are scored on in the end."""
    train: int
    """Images that the student is trained on."""


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of a recipe on this machine, as they were measured."""

    teacher_step: tuple[float, float]
    """Seconds of a step of stage 1: without classes, and for each class more."""
    student_step: float
    """Seconds of a step of stage 2, the teacher's features apart."""
    teacher_features: float
    """Seconds of the teacher for one image."""
    student_features: float
    """Seconds of the student for one image."""
    decoding: float
    """Seconds to decode and crop one image in one process."""
    student_bytes: int
    """Of student.pt."""
    teacher_bytes: int
    """Of teacher.pt; 0 for a teacher that is not trained."""
    feature_bytes: int
    """Of one image's features."""

    def seconds(self, recipe: Recipe, load: Load, device_type: str, workers: int) -> float:
        """Of a run. workers: processes that decode; on a CPU they share its cores with the training."""
        adapt = recipe.teacher.adapt
        fixed, per_class = self.teacher_step
        teacher_images = load.teacher_steps * int(getattr(adapt, "batch_size", 0))
        student_images = load.student_steps * recipe.optim.batch_size
        scored = load.teacher_scored + load.student_scored + load.evaluated
        computing = (
            load.teacher_steps * (fixed + per_class * load.classes)
            + load.student_steps * self.student_step
            + student_images * self.teacher_features * _share_of_views(recipe)
            + (load.teacher_scored + load.evaluated) * self.teacher_features
            + (load.student_scored + load.evaluated) * self.student_features
        )
        decoding = (teacher_images + student_images + scored) * self.decoding
        return computing + decoding if device_type == "cpu" else max(computing, decoding / max(1, workers))

    def kept_bytes(self, load: Load) -> int:
        """Of a run's files under RUNS: the student, its features of the test images, and a teacher if it trains one."""
        teacher = self.teacher_bytes + load.evaluated * self.feature_bytes if load.teacher_steps else 0
        return self.student_bytes + load.evaluated * self.feature_bytes + teacher

    def cache_bytes(self, recipe: Recipe, load: Load) -> int:
        """Of the teacher cache that the seeds of a dataset share; 0 for a recipe without one."""
        cache = recipe.teacher_cache
        if cache is None:
            return 0
        return load.train * cache.views * self.feature_bytes // (1 if cache.dtype == "fp32" else 2)

    @property
    def line(self) -> str:
        """What was measured, in one sentence."""
        fixed, per_class = self.teacher_step
        return (
            f"Measured with random weights: {fixed:.3f} s for each step of the teacher plus {per_class:.4f} s for each "
            f"class, {self.student_step:.3f} s for each step of the student; for each image "
            f"{self.teacher_features:.4f} s in the teacher, {self.student_features:.4f} s in the student and "
            f"{self.decoding:.4f} s to decode."
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Of the checkpoint of the run that is being trained."""
        return STATES * max(self.student_bytes, self.teacher_bytes)


def measure(recipe: Recipe, classes: int, images: ImageSet | None, accelerator: Accelerator) -> Costs:
    """Time a step of each stage, scoring, and decoding. classes: of the largest dataset. images: some that are decoded.

    The models have the recipe's architectures and random weights. Raises ModelError.
    """
    device = accelerator.device
    settings = recipe.teacher
    clip = build_clip(Model(arch=settings.arch, config=settings.config), load_weights=False)
    dim = int(clip.model.encode_text(clip.tokenize(["a"])).shape[-1])  # type: ignore[operator]
    stage_1 = _Stage1(recipe, clip, accelerator)
    teacher_step = stage_1.seconds(classes)
    tower: nn.Module = clip.model.visual  # type: ignore[assignment]
    tower.to(device)
    tower.eval()
    image_tower = build_image_tower(recipe.student, load_weights=False)
    vectors = nn.functional.normalize(torch.randn(classes, dim), dim=-1)
    scale = torch.tensor(method.MOST_LOGIT_SCALE)
    student = Student(
        image_tower.module, image_tower.width, vectors, scale, recipe.student, recipe.loss.edu_attention
    ).to(device)
    teacher = method.Teacher(tower, vectors, scale).to(device)
    batch = max(2, recipe.optim.batch_size // ranks.world_size())
    own, of_teacher = (_blank(batch, p.size, device) for p in (image_tower.preprocessing, clip.preprocessing))
    with accelerator.autocast():
        features = _timed(lambda: teacher.encode(of_teacher), device)
        answer = teacher(of_teacher)
        step = _timed(lambda: accelerator.backward(_student_loss(student, own, answer, recipe)), device)
        student.eval()
        with torch.no_grad():
            scoring = _timed(lambda: student(own), device)
    return Costs(
        teacher_step=teacher_step,
        student_step=step,
        teacher_features=features / batch,
        student_features=scoring / batch,
        decoding=_decoding_seconds(images, recipe, [clip.preprocessing, image_tower.preprocessing]),
        student_bytes=_saved_bytes({**student.learned_state(), "class_vectors": vectors}),
        teacher_bytes=stage_1.saved_bytes(dim, classes),
        feature_bytes=dim * BYTES,
    )


class _Stage1:
    """A step of stage 1 on a CLIP with random weights; of a teacher that is not trained, none."""

    def __init__(self, recipe: Recipe, clip: Any, accelerator: Accelerator) -> None:
        self._adapt = recipe.teacher.adapt
        self._clip, self._accelerator, self._device = clip, accelerator, accelerator.device
        adapt = self._adapt
        clip.model.to(self._device)
        self._prompted = None
        if isinstance(adapt, PromptSrcAdapt):
            self._prompted = prompted_clip(clip, adapt.vision_depth, adapt.text_depth, adapt.tokens)
            self._prompted.module.to(self._device)

    def seconds(self, classes: int) -> tuple[float, float]:
        """Seconds of a step without classes, and for each class more, from steps with two numbers of classes."""
        if not isinstance(self._adapt, PromptSrcAdapt | FullAdapt):
            return 0.0, 0.0
        few, more = FEW_CLASSES
        if self._device.type != "cpu":  # which needs many classes to be busy
            few = int(getattr(self._adapt, "classes_at_once", classes))
            more = 2 * few
        few, more = min(few, classes), min(more, classes)
        first = self._step_seconds(few)
        if few == more:
            return first, 0.0
        per_class = max(0.0, (self._step_seconds(more) - first) / (more - few))
        return max(0.0, first - few * per_class), per_class

    def _step_seconds(self, classes: int) -> float:
        adapt, device = self._adapt, self._device
        assert isinstance(adapt, PromptSrcAdapt | FullAdapt)  # seconds made sure
        batch = max(2, adapt.batch_size // ranks.world_size())
        images = _blank(batch, self._clip.preprocessing.size, device)
        labels = torch.arange(batch, device=device) % classes
        names = [f"class {number}" for number in range(classes)]
        step: Callable[[], object]
        if self._prompted is None:
            tokens = self._clip.tokenize([f"a photo of a {name}." for name in names]).to(device)
            classifier = method.PromptClassifier(self._clip.model, tokens)

            def step() -> None:
                self._accelerator.backward(nn.functional.cross_entropy(classifier(images), labels))
        else:
            module = self._prompted.module
            tokens = self._prompted.tokens(names).to(device)
            frozen = module.encode_classes(tokens).detach()

            def step() -> None:
                output = module(images, tokens, frozen, getattr(adapt, "classes_at_once", classes))
                terms = prompt_src_terms(output, labels, frozen, 1.0, 1.0, 1.0)
                self._accelerator.backward(torch.stack(list(terms.values())).sum())

        with self._accelerator.autocast():
            seconds = _timed(step, device)
        for parameter in self._clip.model.parameters():
            parameter.grad = None
        return seconds

    def saved_bytes(self, dim: int, classes: int) -> int:
        """Of teacher.pt: its prompts, or all weights, and the class vectors."""
        vectors = torch.empty(classes, dim)
        if self._prompted is not None:
            return _saved_bytes({**self._prompted.module.prompts(), "class_vectors": vectors})
        if isinstance(self._adapt, FullAdapt):
            return sum(value.numel() * value.element_size() for value in self._clip.model.state_dict().values())
        return vectors.numel() * BYTES if self._adapt.method != "none" else 0


def _student_loss(student: Student, images: Tensor, answer: method.TeacherOutput, recipe: Recipe) -> Tensor:
    student.train()
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    terms = loss_terms(student(images), answer, recipe.loss, labels)
    return torch.stack(list(terms.values())).sum()


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the fastest of REPEATS."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _decoding_seconds(images: ImageSet | None, recipe: Recipe, preprocessings: list[Preprocessing]) -> float:
    """Seconds to decode and crop an image, the mean of a few; 0 if there are none to read."""
    if images is None or not len(images):
        return 0.0
    started, read = time.perf_counter(), 0
    for index in images.spaced(DECODED_IMAGES)[:DECODED_IMAGES]:
        try:
            training_inputs(images.open(index), preprocessings, recipe.augment, seed=index)
        except UnreadableImage:  # named while training
            continue
        read += 1
    return (time.perf_counter() - started) / max(1, read)


def _share_of_views(recipe: Recipe) -> float:
    """The share of the epochs in which the teacher runs: with a cache, those of new views."""
    cache = recipe.teacher_cache
    return 1.0 if cache is None else min(1.0, cache.views / recipe.optim.epochs)


def _blank(batch: int, size: int, device: torch.device) -> Tensor:
    return torch.randn(batch, 3, size, size, device=device)


def _saved_bytes(tensors: dict[str, Tensor]) -> int:
    stream = io.BytesIO()
    torch.save({name: value.detach().cpu() for name, value in tensors.items()}, stream)
    return stream.tell()
