"""With IFAlign and EduAttention off, a run is PromptKD: step for step the loop that is written out here."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from comkd_cli.data.loaders import Crops, Steps, TrainingLoader
from comkd_cli.data.sources import open_source
from comkd_cli.events import Event, Progress
from comkd_cli.flows import adapt, distill
from comkd_cli.models.backbones import build_clip, build_image_tower
from comkd_cli.models.checkpoints import load_student
from comkd_cli.recipe import parse_recipe
from comkd_cli.recipe.model import Model
from comkd_cli.training import loop
from comkd_cli.training.accelerator import make_accelerator
from tests import tiny
from tests.method.test_prompts import prompted_by_hand

pytestmark = pytest.mark.usefixtures("few_digits")

EPOCHS, RATE, BATCH = 5, 0.02, 32
STEPS = tiny.TRAIN // BATCH


class Plain(nn.Module):
    """PromptKD's student: a frozen vision transformer with prompts, and a projector of two 1 x 1 convolutions."""

    def __init__(self, visual: nn.Module, prompts: Tensor, projector: nn.Sequential) -> None:
        super().__init__()
        self.visual = visual.requires_grad_(False)
        self.prompts = nn.Parameter(prompts.clone())
        first, norm, _, second = copy.deepcopy(projector)
        self.first = nn.Conv2d(first.in_features, first.out_features, 1)
        self.norm = nn.BatchNorm2d(first.out_features)
        self.second = nn.Conv2d(second.in_features, second.out_features, 1)
        for mine, theirs in ((self.first, first), (self.second, second)):
            mine.weight.data = theirs.weight.data[:, :, None, None].clone()
            mine.bias.data = theirs.bias.data.clone()
        self.norm.load_state_dict(norm.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        features = prompted_by_hand(self.visual, self.prompts, images)[:, :, None, None]
        features = self.second(functional.relu(self.norm(self.first(features)))).flatten(1)
        return features / features.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    for name, config, seed in (("teacher", tiny.CLIP, 3), ("student", tiny.TOWER, 4)):
        whole = {**config, "text_cfg": tiny.CLIP["text_cfg"]}
        torch.save(build_clip(Model(config=whole), seed=seed).model.state_dict(), folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in ("teacher", "student")}


@pytest.mark.slow
def test_a_run_without_both_modules_is_promptkd_step_for_step(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = {"name": "sgd", "learning_rate": RATE, "batch_size": BATCH, "epochs": EPOCHS}
    recipe = parse_recipe(
        tiny.recipe(
            teacher={"config": tiny.CLIP, "weights": str(weights["teacher"])},
            student={"config": tiny.TOWER, "weights": str(weights["student"]), "prompts": {"tokens": 3, "depth": 1}},
            loss={"refinement": {"weight": 1000.0}, "if_align": None, "edu_attention": None},
            optim=optim,
        )
    )
    source = open_source(recipe.data, tmp_path)
    stage = adapt.stage_1(recipe, source, tmp_path, tmp_path)
    run = distill.Run(recipe, "promptkd", source, tmp_path, stage.contents, stage.key)

    # Each step's loss from the events, which hold the average of the epoch so far.
    monkeypatch.setattr(loop, "REPORT_EVERY_SECONDS", 0.0)
    sums: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and event.label.startswith("student"):
            sums.append(event.figures["loss"] * (len(sums) % STEPS + 1))

    accelerator = make_accelerator("fp32")
    teacher_source = adapt.TeacherPreparation(stage, accelerator, lambda event: None, "")
    path = distill.distill(run, teacher_source, accelerator, on_event, "")
    losses = [total - (sums[step - 1] if step % STEPS else 0.0) for step, total in enumerate(sums)]

    teacher = build_clip(recipe.teacher)
    with torch.no_grad():
        vectors = functional.normalize(teacher.model.encode_text(teacher.tokenize(source.prompts)), dim=-1)
    scale = teacher.model.logit_scale.exp().detach()
    tower = build_image_tower(recipe.student)
    start = distill.build_student(recipe, build_image_tower(recipe.student), vectors, scale)
    plain = Plain(tower.module, start.backbone.tokens.detach(), start.projector)  # type: ignore[arg-type,union-attr]
    learning = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=RATE, momentum=0.9, weight_decay=5e-4)
    loader = TrainingLoader(
        source.train,
        [teacher.preprocessing, tower.preprocessing],
        Crops(recipe.augment, recipe.seed),
        Steps(BATCH, recipe.seed),
        0,
    )
    expected = []
    plain.train()
    plain.visual.eval()
    for epoch in range(EPOCHS):
        rate = 1e-5 if epoch == 0 else RATE / 2 * (1 + math.cos(math.pi * (epoch - 1) / EPOCHS))
        optimizer.param_groups[0]["lr"] = rate
        for (batch,) in loader.epoch(epoch):
            with torch.no_grad():
                features = functional.normalize(teacher.model.encode_image(batch.inputs[0]), dim=-1)
                teacher_logits = scale * features @ vectors.T
            logits = scale * plain(batch.inputs[1]) @ vectors.T
            divergence = functional.kl_div(
                functional.log_softmax(logits, dim=1),
                functional.log_softmax(teacher_logits, dim=1),
                reduction="sum",
                log_target=True,
            )
            loss = 1000.0 * divergence / logits.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))

    assert len(losses) == len(expected) == EPOCHS * STEPS
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[:30] == pytest.approx(expected[:30], rel=1e-5)
    assert expected[-1] < 0.5 * max(expected)  # after the warm-up, which ends with a leap, something was learned
    student, _ = load_student(path)
    torch.testing.assert_close(student.backbone.tokens, plain.prompts, atol=1e-3, rtol=1e-3)  # type: ignore[union-attr]
