"""A step of the Trainer by all processes of torchrun, against one process's on the whole batch by plain PyTorch.

Prints a line for each case: its name, and how far the loss, all gradients and the running statistics are from those
of one process, relative to their size.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

from comkd_cli.data.loaders import Batch
from comkd_cli.method.objective import loss_terms
from comkd_cli.method.student import Student
from comkd_cli.method.teacher import TeacherOutput
from comkd_cli.models.backbones import build_image_tower
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import EduAttention, IFAlign, Labels, Loss, Model, Refinement, Sgd
from comkd_cli.recipe.model import Student as Settings
from comkd_cli.runtime.ranks import is_main, rank
from comkd_cli.training.accelerator import make_accelerator
from comkd_cli.training.loop import Trainer
from comkd_cli.training.task import Objective, StepResult, Task
from tests import tiny

IMAGES, CLASSES, DIM = 16, 5, 16
# A third of the images have a label; of an unequal share's single image, the last, it is unknown.
LABELS = [index % CLASSES if index % 3 == 1 else -1 for index in range(IMAGES)]
# Small towers of each kind: patch tokens alone, PyTorch's own batch norms, timm's with an activation inside.
TOWERS = {
    "vit": tiny.TOWER,
    "resnet": {
        "embed_dim": 12,
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_proj": "linear", "timm_pool": "", "image_size": 32},
    },
    "efficientnet": {
        "embed_dim": 12,
        "vision_cfg": {
            "timm_model_name": "test_efficientnet",
            "timm_proj": "linear",
            "timm_pool": "",
            "image_size": 32,
        },
    },
}
SHARES = {"equal": (8, 8), "unequal": (15, 1)}


def student(config: dict) -> Student:  # type: ignore[type-arg]
    torch.manual_seed(3)
    tower = build_image_tower(Model(config=config), seed=1)
    vectors = functional.normalize(torch.randn(CLASSES, DIM), dim=-1)
    settings = Settings(config=config, train="full")
    return Student(
        tower.module, tower.width, vectors, torch.tensor(20.0), settings, EduAttention(gate_start=0.5)
    ).train()


def plain_loss(made: Student, images: torch.Tensor, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The objective written out: 100 KL / (batch x classes) + 0.1 (L1 of means + L1 of variances) + 2 cross-entropy."""
    output = made(images)
    wanted, given = functional.softmax(logits, dim=1), functional.log_softmax(output.logits, dim=1)
    divergence = (wanted * (wanted.log() - given)).sum() / (len(images) * CLASSES)
    unit = output.projected / output.projected.norm(dim=1, keepdim=True)
    means = (unit.mean(0) - features.mean(0)).abs().sum()
    variances = ((unit - unit.mean(0)).square().mean(0) - (features - features.mean(0)).square().mean(0)).abs().sum()
    known = [index for index, label in enumerate(LABELS) if label >= 0]
    likely = functional.softmax(output.logits, dim=1)[known, [LABELS[index] for index in known]]
    return 100 * divergence + 0.1 * (means + variances) - 2 * likely.log().mean()


@dataclass(frozen=True)
class Given(Objective):
    """The student's objective, with a teacher whose features and logits of each image are given."""

    features: torch.Tensor
    logits: torch.Tensor

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        teacher = TeacherOutput(self.features[batch.indices], self.logits[batch.indices])
        settings = Loss(
            refinement=Refinement(weight=100.0),
            if_align=IFAlign(weight=0.1),
            edu_attention=None,
            labels=Labels(weight=2.0),
        )
        terms = loss_terms(model(batch.inputs[0]), teacher, settings, batch.labels)
        return StepResult(torch.stack(list(terms.values())).sum())


@dataclass(frozen=True)
class OneStep:
    """A loader whose only step has these images, of which this process gets its share."""

    images: torch.Tensor
    mine: slice
    steps_per_epoch = 1
    batch_size = image_count = IMAGES

    def epoch(self, _epoch: int, _first_step: int) -> Iterator[tuple[Batch]]:
        yield (Batch((self.images[self.mine],), torch.tensor(LABELS)[self.mine], torch.arange(IMAGES)[self.mine]),)


def differences(name: str, share: tuple[int, ...], accelerator: Accelerator) -> dict[str, float]:
    alone = student(TOWERS[name])
    shared = copy.deepcopy(alone)
    size = 16 if name == "vit" else 32
    images = torch.randn(IMAGES, 3, size, size)
    features = functional.normalize(torch.randn(IMAGES, DIM), dim=-1)
    logits = 20 * features @ alone.class_vectors.T
    whole = plain_loss(alone, images, features, logits)
    whole.backward()

    first = sum(share[: rank()])
    task = Task(
        model=shared,
        objective=Given(features, logits),
        loader=OneStep(images, slice(first, first + share[rank()])),  # type: ignore[arg-type]
        optim=Sgd(epochs=1, batch_size=IMAGES),
        folder=Path(tempfile.mkdtemp()),
        identity=Identity({}),
        seed=1,
        label="step",
        resume_line="",
        unreadable_limit_percent=0.0,
        uses_all_parameters=True,
    )
    gradients: list[torch.Tensor] = []
    hook = register_optimizer_step_pre_hook(
        lambda _optimizer, _args, _kwargs: gradients.extend(p.grad.clone() for p in shared.parameters())  # type: ignore[union-attr,misc]
    )
    (history,) = Trainer(task, accelerator, lambda event: None).fit()
    hook.remove()

    def distance(pairs) -> float:  # type: ignore[no-untyped-def]
        left, right = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*pairs, strict=True))
        return float((left - right).norm() / right.norm())

    statistics = [(a, b) for a, b in zip(shared.buffers(), alone.buffers(), strict=True) if b.is_floating_point()]
    return {
        "loss": abs(history["loss"] / float(whole.detach()) - 1),
        "gradient": distance((a, b.grad) for a, b in zip(gradients, alone.parameters(), strict=True)),
        "statistics": distance(statistics),
        "batch_norms": sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in shared.modules()),
    }


def main() -> None:
    accelerator = make_accelerator("fp32")
    for name in TOWERS:
        for case, share in SHARES.items():
            torch.manual_seed(11)
            found = differences(name, share, accelerator)
            if is_main():
                sys.stdout.write(json.dumps({"case": f"{name}, {case}", **found}) + "\n")


if __name__ == "__main__":
    main()
