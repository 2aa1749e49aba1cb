import json
from pathlib import Path

import pytest
import torch
from torch import nn

from comkd_cli.data.digits import digits_source
from comkd_cli.data.loaders import Batch, Crops, Steps, TrainingLoader
from comkd_cli.edge.images import Preprocessing
from comkd_cli.errors import Interrupted
from comkd_cli.events import Epoch, Event, Progress
from comkd_cli.recipe.identity import Identity
from comkd_cli.recipe.model import AdamW, Augment, Sgd
from comkd_cli.training.accelerator import make_accelerator
from comkd_cli.training.checkpoint import checkpoint_file, delete_checkpoint
from comkd_cli.training.loop import Trainer
from comkd_cli.training.task import Objective, StepResult, Task

INPUT = Preprocessing(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Net(nn.Module):
    """Small, with all that a resumed run must bring back: norms with statistics, dropout, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(192, 192)
        self.frozen.requires_grad_(False)
        self.layers = nn.Sequential(nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(self.frozen(images.flatten(1)))
        return out


class CrossEntropy(Objective):
    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        loss = nn.functional.cross_entropy(model(batch.inputs[0]), batch.labels)
        return StepResult(loss, {"twice": 2 * loss})


def task(folder: Path, **changes: object) -> Task:
    torch.manual_seed(0)
    images = digits_source().train.subset(list(range(50)))
    settings: dict[str, object] = {
        "model": Net(),
        "objective": CrossEntropy(),
        "loader": TrainingLoader(
            images, [INPUT], Crops(Augment(min_scale=0.8, flip=False), 1), Steps(16, 1), workers=0
        ),
        "optim": AdamW(epochs=3, batch_size=16),
        "folder": folder,
        "identity": Identity({"name": "a"}),
        "seed": 1,
        "label": "net",
        "resume_line": "comkd distill it",
        "unreadable_limit_percent": 0.0,
    }
    return Task(**{**settings, **changes})  # type: ignore[arg-type]


def train(made: Task, on_event=lambda event: None) -> list[dict[str, float]]:  # type: ignore[no-untyped-def]
    return Trainer(made, make_accelerator("fp32"), on_event).fit()


def same(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optim", [AdamW(epochs=3, batch_size=16), Sgd(epochs=3, batch_size=16)])
@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, optim: AdamW | Sgd
) -> None:
    whole = task(tmp_path / "whole", optim=optim)
    history = train(whole)
    stopped = task(tmp_path / "stopped", optim=optim)
    with monkeypatch.context() as patch:
        stop_after_steps(patch, stop_at)
        with pytest.raises(Interrupted, match="comkd distill it") as interrupted:
            train(stopped)
    assert interrupted.value.exit_code == 130
    resumed = task(tmp_path / "stopped", optim=optim)
    with torch.no_grad():  # nothing of the new process may matter but the frozen part
        for parameter in resumed.model.layers.parameters():  # type: ignore[union-attr]
            parameter.normal_()
    torch.manual_seed(99)
    resumed_history = train(resumed)
    assert same(whole.model, resumed.model)
    for first, second in zip(history, resumed_history, strict=True):
        assert {**first, "images_per_second": 0} == {**second, "images_per_second": 0}


class Recorded(CrossEntropy):
    """Keeps the weights of every step and of every evaluation."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps, self.scored = model, [], []  # type: ignore[var-annotated]

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        self.steps.append(self._state())  # before this step: after the one before it
        return super().loss(model, batch, probe)

    def evaluate(self) -> dict[str, float]:
        self.scored.append(self._state())
        return {}

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def test_the_moving_average_of_all_steps_is_scored_and_kept(tmp_path: Path) -> None:
    model = Net()
    recorded = Recorded(model)
    made = task(tmp_path, model=model, objective=recorded, ema_decay=0.6, evaluate_every_epochs=1)
    train(made)
    # 3 epochs of 3 steps; the loss sees the weights before each step, so the last step's are not among them.
    after, name = [state["layers.0.weight"] for state in recorded.steps[1:]], "layers.0.weight"
    average = after[0]
    for step, weights in enumerate(after[1:], start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights
        if step in (2, 5):  # the last step of the first and of the second epoch
            assert torch.allclose(recorded.scored[step // 3][name], average, atol=1e-6)
    assert not torch.allclose(recorded.scored[1][name], after[5])
    kept = model.state_dict()
    assert all(torch.equal(kept[key], recorded.scored[2][key]) for key in kept)  # what is scored last is what is kept
    assert int(kept["layers.1.num_batches_tracked"]) == 9
    assert torch.equal(recorded.steps[3]["layers.0.weight"], after[2])  # scoring the average does not move the training


def test_a_stopped_run_with_a_moving_average_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (task(tmp_path / name, ema_decay=0.9) for name in ("whole", "stopped"))
    train(whole)
    with monkeypatch.context() as patch:
        stop_after_steps(patch, 4)
        with pytest.raises(Interrupted):
            train(stopped)
    resumed = task(tmp_path / "stopped", ema_decay=0.9)
    train(resumed)
    assert same(whole.model, resumed.model)


def stop_after_steps(patch: pytest.MonkeyPatch, steps: int) -> None:
    from contextlib import contextmanager

    calls = 0

    @contextmanager
    def requests():  # type: ignore[no-untyped-def]
        def exit_code() -> int | None:
            nonlocal calls
            calls += 1
            return 130 if calls >= steps else None

        yield exit_code

    patch.setattr("comkd_cli.training.loop.stop_requests", requests)


def test_metrics_hold_a_line_an_epoch_with_the_averages(tmp_path: Path) -> None:
    history = train(task(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("images_per_second") > 0 for line in lines)
    assert lines == history  # which is stored with the weights, so that they have the same bytes after every run
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(line["twice"] == pytest.approx(2 * line["loss"]) for line in lines)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    history = train(task(tmp_path, optim=AdamW(epochs=30, batch_size=16, learning_rate=0.01)))
    assert history[-1]["loss"] < history[0]["loss"] / 2


def test_events_tell_images_and_epochs(tmp_path: Path) -> None:
    events: list[Event] = []
    train(task(tmp_path), events.append)
    assert [event.number for event in events if isinstance(event, Epoch)] == [1, 2, 3]
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total == 3 * 48


def test_a_frozen_part_never_moves_and_is_not_in_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(tmp_path)
    before = made.model.frozen.weight.clone()  # type: ignore[operator,union-attr]
    stop_after_steps(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(made)
    assert torch.equal(made.model.frozen.weight, before)  # type: ignore[arg-type,union-attr]
    state = torch.load(checkpoint_file(tmp_path), weights_only=True)
    assert not any(name.startswith("frozen") for name in state["model"])


def test_a_parameter_can_learn_at_a_multiple_of_the_others_rate(tmp_path: Path) -> None:
    made = task(tmp_path, optim=Sgd(epochs=1, batch_size=16, warmup_epochs=0, momentum=0.0, weight_decay=0.0))
    reference = task(tmp_path / "b", optim=made.optim)
    faster = task(tmp_path / "c", optim=made.optim, rate_factors={"layers.3.bias": 10.0})
    start = made.model.state_dict()["layers.3.bias"].clone()
    for each in (reference, faster):
        one_step(each)
    moved = [each.model.state_dict()["layers.3.bias"] - start for each in (reference, faster)]
    assert torch.allclose(moved[1], 10 * moved[0], rtol=1e-3)


def one_step(made: Task) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after_steps(patch, 1)
        with pytest.raises(Interrupted):
            train(made)


class PlainNet(nn.Module):
    """Nothing in it depends on the batch around an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(images.flatten(1))
        return out


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_in_parts_trains_as_a_whole_one(tmp_path: Path, parts: int) -> None:
    """16 images in 3 or 5 parts are not the same number each: every image counts alike all the same."""
    images = digits_source().train.subset(list(range(50)))
    trained = []
    for count in (1, parts):
        torch.manual_seed(0)
        loader = TrainingLoader(images, [INPUT], Crops(Augment(min_scale=0.8, flip=False), 1), Steps(16, 1, count), 0)
        made = task(tmp_path / str(count), model=PlainNet(), loader=loader, optim=Sgd(epochs=3, learning_rate=0.1))
        history = train(made)
        trained.append((made.model.state_dict(), history))
    (whole, whole_history), (split, split_history) = trained
    for name, value in whole.items():
        assert torch.allclose(split[name], value, rtol=1e-4, atol=1e-6)
    for left, right in zip(whole_history, split_history, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["twice"] == pytest.approx(left["twice"], rel=1e-5)


def test_a_part_is_all_that_the_model_sees_at_once(tmp_path: Path) -> None:
    images = digits_source().train.subset(list(range(50)))
    loader = TrainingLoader(images, [INPUT], Crops(Augment(), 1), Steps(16, 1, 4), 0)
    seen: list[int] = []

    class Counting(CrossEntropy):
        def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
            seen.append(len(batch))
            return super().loss(model, batch, probe)

    train(task(tmp_path, loader=loader, objective=Counting(), optim=Sgd(epochs=1)))
    assert seen == [4] * 12


def test_steps_are_flushed_before_a_checkpoint_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of an epoch, and in the middle of one where the run is stopped."""
    calls: list[tuple[bool, bool]] = []

    class Flushing(CrossEntropy):
        def flush(self, epoch_ended: bool) -> None:
            calls.append((epoch_ended, checkpoint_file(tmp_path).exists()))

    train(task(tmp_path, optim=Sgd(epochs=2), objective=Flushing()))
    assert calls == [(True, False), (True, True)]
    delete_checkpoint(tmp_path)
    calls.clear()
    stop_after_steps(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(task(tmp_path, optim=Sgd(epochs=2), objective=Flushing()))
    assert calls == [(False, False)]


def test_an_objective_is_probed_once_an_epoch_also_where_the_batch_comes_in_parts(tmp_path: Path) -> None:
    images = digits_source().train.subset(list(range(50)))
    loader = TrainingLoader(images, [INPUT], Crops(Augment(), 1), Steps(16, 1, 2), 0)

    class Probed(CrossEntropy):
        probes = 0

        def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
            self.probes += probe
            result = super().loss(model, batch, probe)
            return StepResult(result.loss, result.figures, {"probes": float(self.probes)} if probe else {})

    history = train(task(tmp_path, loader=loader, objective=Probed()))
    assert [line["probes"] for line in history] == [1, 2, 3]


class CountsThreads(CrossEntropy):
    """Notes the threads of each step."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        self.threads.append(torch.get_num_threads())
        return super().loss(model, batch, probe)


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "expected"), [(2, 2), (1, 1), (None, 3)])
def test_the_steps_have_the_threads_of_the_task(tmp_path: Path, threads: int | None, expected: int) -> None:
    before, counts = torch.get_num_threads(), CountsThreads()
    torch.set_num_threads(3)
    try:
        train(task(tmp_path, objective=counts, threads=threads))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(counts.threads) == {expected}
