import math
from pathlib import Path

import pytest
import torch
from torch import nn

from comkd_cli.data.digits import digits_source
from comkd_cli.data.loaders import Batch
from comkd_cli.errors import TrainingError
from comkd_cli.events import Event, Notice
from comkd_cli.recipe.model import AdamW, Sgd
from comkd_cli.training.accelerator import make_accelerator
from comkd_cli.training.checkpoint import has_checkpoint
from comkd_cli.training.finite import MOST_IMAGES, NumberWatch
from comkd_cli.training.loop import Trainer
from comkd_cli.training.position import Position
from comkd_cli.training.task import StepResult
from tests.training.test_loop import CrossEntropy, same, task, train


class WrongFrom(CrossEntropy):
    """Another term is added from a step on, both counted over the whole run from 0."""

    def __init__(self, step: int, term) -> None:  # type: ignore[no-untyped-def]
        self.step, self.term, self.steps, self.indices = step, term, 0, torch.empty(0)

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        result = super().loss(model, batch, probe)
        self.steps += 1
        self.indices = batch.indices
        if self.steps <= self.step:
            return result
        wrong = self.term(next(p for p in model.parameters() if p.requires_grad))
        return StepResult(result.loss + wrong, {**result.figures, "wrong": wrong})


def not_finite(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.sum() * math.inf


def without_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """0, with the gradient 0 * inf."""
    return (parameter.sum() * 0).sqrt()


@pytest.mark.parametrize(("term", "names"), [(not_finite, "wrong, loss"), (without_gradient, "gradient")])
def test_the_run_stops_with_the_step_the_terms_and_the_images_and_resumes_from_the_checkpoint_before(
    tmp_path: Path, term: object, names: str
) -> None:
    """Steps of 16 of 50 images are 3 an epoch: the fifth is the second of epoch 2."""
    whole = task(tmp_path / "whole")
    train(whole)
    objective = WrongFrom(4, term)
    wrong = task(tmp_path / "run", objective=objective)
    with pytest.raises(TrainingError) as caught:
        train(wrong)
    keys = digits_source().train.subset(list(range(50))).keys
    shown = ", ".join(keys[index] for index in objective.indices[:MOST_IMAGES].tolist())
    assert caught.value.problem == (
        f"net: {names} not finite in epoch 2, step 2, on the images {shown} and {16 - MOST_IMAGES} more"
    )
    assert not math.isfinite(caught.value.found)  # type: ignore[arg-type]
    assert has_checkpoint(tmp_path / "run", wrong.identity)
    resumed = task(tmp_path / "run")
    assert [line["epoch"] for line in train(resumed)] == [1, 2, 3]
    assert same(whole.model, resumed.model)


def batch(*indices: int) -> Batch:
    return Batch((torch.zeros(len(indices), 1),), None, torch.tensor(indices))


def test_a_later_check_finds_the_first_step_and_part_that_went_wrong(tmp_path: Path) -> None:
    watch = NumberWatch(task(tmp_path))
    first = torch.tensor(1.0)
    watch.add(Position(epoch=2, step=6), [batch(1, 2)], {"a": first, "loss": torch.tensor(1e30)})
    first.fill_(math.nan)  # a figure may be a parameter, which later steps change
    watch.check()
    watch.add(Position(epoch=2, step=7), [batch(3)], {"a": torch.tensor(0.5), "loss": torch.tensor(2.0)})
    watch.add(Position(epoch=2, step=7), [batch(4)], {"a": torch.tensor(0.5), "loss": torch.tensor(-math.inf)})
    watch.add(Position(epoch=2, step=8), [batch(5)], {"a": torch.tensor(math.nan), "loss": torch.tensor(math.nan)})
    with pytest.raises(TrainingError) as caught:
        watch.check()
    key = digits_source().train.keys[4]
    assert caught.value.problem == f"net: loss not finite in epoch 3, step 8, on the images {key}"
    assert caught.value.found == -math.inf
    watch.check()  # what was read is not kept


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path: Path) -> None:
    made = task(tmp_path)
    train(task(tmp_path, optim=AdamW(epochs=3, batch_size=16)))
    before = (tmp_path / "state" / "state.pt").read_bytes()
    trainer = Trainer(made, make_accelerator("fp32"), lambda event: None)
    trainer.fit()
    with torch.no_grad():
        made.model.layers[1].running_var.fill_(math.inf)  # type: ignore[index,union-attr]
    with pytest.raises(TrainingError, match="a weight is not finite"):
        trainer._save()
    assert (tmp_path / "state" / "state.pt").read_bytes() == before


@pytest.mark.parametrize("longest", [1e-3, 1e6])
def test_a_gradient_is_clipped_to_a_length(tmp_path: Path, longest: float) -> None:
    """One step of plain SGD moves the weights by the rate times the gradient."""
    plain = {"epochs": 1, "batch_size": 50, "warmup_epochs": 0, "momentum": 0.0, "weight_decay": 0.0}
    moved = []
    for clip in (None, longest):
        made = task(tmp_path / str(clip), optim=Sgd(**plain, clip_gradient_norm=clip, learning_rate=0.1))  # type: ignore[arg-type]
        before = [each.detach().clone() for each in made.model.parameters()]
        train(made)
        steps = [(new.detach() - old).flatten() for new, old in zip(made.model.parameters(), before, strict=True)]
        moved.append(torch.cat(steps))
    length = moved[0].norm() / (3 * 0.1)
    assert length > 1e-2
    if longest > length:
        assert torch.equal(moved[0], moved[1])
    else:
        assert float(moved[1].norm()) <= 3 * 0.1 * longest * 1.001


class Large(CrossEntropy):
    """Its gradients overflow float32 at the scales below."""

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        return StepResult(super().loss(model, batch, probe).loss * 100)


def test_steps_that_overflow_in_fp16_are_counted_and_are_no_error(tmp_path: Path) -> None:
    """The scaler of a CPU, since fp16 itself needs a GPU: it starts so high that some steps overflow."""
    events: list[Event] = []
    accelerator = make_accelerator("fp32")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    history = Trainer(task(tmp_path, objective=Large()), accelerator, events.append).fit()
    counts = [line["overflowed_steps"] for line in history]
    assert 0 < sum(counts) < 9
    assert counts[0] == max(counts)
    (notice,) = [event.text for event in events if isinstance(event, Notice) and "fp16" in event.text]
    assert notice.startswith(f"{sum(counts)} steps overflowed")


def test_an_epoch_of_overflows_alone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comkd_cli.training.loop.HALVINGS", 3)
    accelerator = make_accelerator("fp32")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)
    with pytest.raises(TrainingError, match="every step of epoch 1 overflowed"):
        Trainer(task(tmp_path, objective=Large()), accelerator, lambda event: None).fit()
