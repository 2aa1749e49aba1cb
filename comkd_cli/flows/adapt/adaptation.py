"""The two ways to train a teacher: every weight of a CLIP, or prompts in a frozen one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from comkd_cli.data.loaders import Batch, worker_count
from comkd_cli.data.prompts import Prompts
from comkd_cli.data.source import Source
from comkd_cli.data.transforms import stable_seed
from comkd_cli.evaluation.subjects import live_teacher
from comkd_cli.evaluation.zero_shot import Scorer
from comkd_cli.events import Notice, Report
from comkd_cli.flows.adapt.stage import Stage1, check_labels, teacher_record
from comkd_cli.method.prompt_src import PromptedClip, epoch_weights, frozen_class_vectors, prompt_src_terms
from comkd_cli.method.teacher import PromptClassifier
from comkd_cli.models.backbones import (
    PROMPTSRC_TEMPLATES,
    Clip,
    build_clip,
    recompute_activations,
    state_sha256,
    uses_all_parameters,
)
from comkd_cli.models.checkpoints import SavedTeacher
from comkd_cli.models.costs import step_multiply_adds, text_multiply_adds
from comkd_cli.recipe.model import FullAdapt, PromptSrcAdapt
from comkd_cli.runtime import collectives
from comkd_cli.teachers.class_vectors import encode_prompts, report_truncation, tokenize_prompts
from comkd_cli.teachers.prompted import prompted_clip
from comkd_cli.training.task import Objective, StepResult


class Adaptation(Objective):
    """A CLIP that is trained as a classifier on labelled images."""

    model: nn.Module
    """What the optimizer trains."""
    tokens: Tensor
    """The token ids of the class prompts, (classes, context)."""
    uses_all_parameters: bool
    """As `Task.uses_all_parameters`."""
    average: Sequence[float] | None = None
    """As `Task.average`."""
    backbone_sha256: str | None = None
    """As `TeacherRecord.backbone_sha256`."""

    def __init__(self, stage: Stage1, source: Source, clip: Clip, device: torch.device, report: Report) -> None:
        data = stage.recipe.data
        self.stage, self.source, self.clip, self.device = stage, source, clip, device
        self.scorer = Scorer(source, device, worker_count(data), report, data.unreadable_limit_percent)

    @property
    @abstractmethod
    def image_tower(self) -> nn.Module:
        """Images to features, (batch, dim)."""

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """exp of the log-scale, without gradients."""

    @abstractmethod
    def class_vectors(self) -> Tensor:
        """The class vectors that the current weights produce, (classes, dim), without gradients."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors to save in teacher.pt."""

    def evaluate(self) -> dict[str, float]:
        """Scores on the test images."""
        self.model.eval()
        teacher = live_teacher(self.image_tower, self.class_vectors(), self.logit_scale, self.clip.preprocessing)
        return self.scorer(teacher)

    def step_multiply_adds(self, batch_size: int) -> int | None:
        """Multiply-adds of a training step, for the number of its threads."""
        tower = (self.image_tower, self.clip.preprocessing.size)
        return step_multiply_adds(batch_size, tower, text=text_multiply_adds(self.clip.model, self.tokens.numel()))

    def saved_teacher(self, metrics: dict[str, float]) -> SavedTeacher:
        """The trained teacher, as teacher.pt holds it. metrics: of the last epoch."""
        self.model.eval()
        record = teacher_record(self.stage, self.source, self.clip, metrics, self.backbone_sha256)
        return SavedTeacher(record, self.class_vectors(), self.logit_scale, self.state_dict())


class FullAdaptation(Adaptation):
    """`adapt: full`: cross-entropy over the first prompt of each class trains every weight of the CLIP."""

    def __init__(self, stage: Stage1, adapt: FullAdapt, device: torch.device, report: Report) -> None:
        recipe, source = stage.recipe, stage.adaptation_source
        check_labels(source, adapt.method)
        seed = stable_seed("teacher", adapt.seed)
        clip = collectives.on_every_rank(lambda: build_clip(recipe.teacher, seed, report=report))
        if recipe.checkpointing:
            recompute_activations(clip.model.visual)  # type: ignore[arg-type]
        self._prompts = source.wording.first()
        if not source.wording.are_single(source.class_names):
            report(Notice("adapt: full learns only the first prompt of each class; the others are not used"))
        self.tokens = tokenize_prompts(clip, source.class_names, self._prompts, report)
        self.model: PromptClassifier = PromptClassifier(clip.model, self.tokens).to(device)
        super().__init__(stage, source, clip, device, report)
        self.label_smoothing = adapt.label_smoothing
        self.uses_all_parameters = uses_all_parameters(clip.model)

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        """Cross-entropy with the labels, the mean over the images."""
        logits: Tensor = model(batch.inputs[0])
        assert batch.labels is not None  # check_labels made sure
        return StepResult(functional.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing))

    @property
    def image_tower(self) -> nn.Module:
        """The CLIP's."""
        tower: nn.Module = self.clip.model.visual  # type: ignore[assignment]
        return tower

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned log-scale."""
        return self.model.logit_scale.detach()

    def class_vectors(self) -> Tensor:
        """Of the first prompt of each class."""
        return encode_prompts(self.clip, self.source.class_names, self._prompts, self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole CLIP."""
        return self.clip.model.state_dict()


class PromptAdaptation(Adaptation):
    """`adapt: promptsrc`: PromptSRC trains prompts in both encoders of the frozen CLIP."""

    uses_all_parameters = True

    def __init__(self, stage: Stage1, adapt: PromptSrcAdapt, source: Source, device: torch.device, report: Report):
        clip = collectives.on_every_rank(lambda: build_clip(stage.recipe.teacher, report=report))
        if stage.recipe.checkpointing:
            recompute_activations(clip.model.visual)  # type: ignore[arg-type]
        clip.model.to(device)
        self.backbone_sha256 = state_sha256(clip.model)
        report_truncation(clip, source.class_names, Prompts(PROMPTSRC_TEMPLATES), report)
        templates = [
            clip.tokenize([template.replace("{}", name) for name in source.class_names]).to(device)
            for template in PROMPTSRC_TEMPLATES
        ]
        # Before the CLIP gets prompts, with which it would not be the frozen one.
        self.frozen_classes = frozen_class_vectors(clip.model, templates)
        seed = stable_seed("teacher prompts", adapt.seed)
        prompted = prompted_clip(clip, adapt.vision_depth, adapt.text_depth, adapt.tokens, seed)
        self.model: PromptedClip = prompted.module.to(device)
        self.tokens = prompted.tokens(source.class_names).to(device)
        super().__init__(stage, source, clip, device, report)
        self.adapt = adapt
        self.average = _epoch_weights(adapt)

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        """The sum of PromptSRC's terms."""
        adapt = self.adapt
        output = model(batch.inputs[0], self.tokens, self.frozen_classes, adapt.classes_at_once)
        assert batch.labels is not None  # check_labels made sure
        terms = prompt_src_terms(
            output, batch.labels, self.frozen_classes, adapt.text_weight, adapt.image_weight, adapt.logits_weight
        )
        return StepResult(torch.stack(list(terms.values())).sum(), dict(terms))

    @property
    def image_tower(self) -> nn.Module:
        """The prompted one."""
        return self.model.vision

    @property
    def logit_scale(self) -> Tensor:
        """exp of the frozen log-scale."""
        return self.model.logit_scale

    @torch.no_grad()
    def class_vectors(self) -> Tensor:
        """Of the class prompts with the learned tokens."""
        return self.model.encode_classes(self.tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """Only the prompts."""
        return {f"prompts.{name}": value for name, value in self.model.prompts().items()}


def _epoch_weights(adapt: PromptSrcAdapt) -> Sequence[float] | None:
    if adapt.gaussian is None:
        return None
    mean = adapt.gaussian.mean or 0.75 * adapt.epochs
    return epoch_weights(adapt.epochs, mean, adapt.gaussian.deviation or adapt.epochs / 20)
