"""Trackers: TensorBoard's files read by its own reader, the calls that the others get, and trackers that fail."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking

from comkd_cli.errors import Interrupted
from comkd_cli.events import Epoch, Event, Notice
from comkd_cli.training.loop import Trainer
from tests.training.test_loop import same, task, train

STEPS = 3  # of an epoch of test_loop.task


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own imports
        yield


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of each figure, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return {tag: [(found.step, found.value) for found in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def test_tensorboard_has_the_figures_of_metrics_and_of_steps(tmp_path: Path) -> None:
    plain = task(tmp_path / "plain")
    train(plain)
    made = task(tmp_path / "tracked", track=("tensorboard",), track_every_steps=2)
    train(made)
    assert same(plain.model, made.model)
    lines = [json.loads(line) for line in (tmp_path / "tracked/metrics.jsonl").read_text().splitlines()]
    found = read(tmp_path / "tracked")
    for name in ("loss", "twice", "learning_rate", "images_per_second"):
        expected = [(STEPS * line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert found[f"net/{name}"] == expected
    assert [step for step, _ in found["net/step/loss"]] == [2, 4, 6, 8]
    assert not (tmp_path / "plain/tensorboard").exists()


def test_a_resumed_run_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(tmp_path, track=("tensorboard",), track_every_steps=1)
    trainer_steps = []
    step = Trainer._step

    def stop_later(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        trainer_steps.append(1)
        if len(trainer_steps) == 4:
            self._stop_code = lambda: 143

    monkeypatch.setattr(Trainer, "_step", stop_later)
    with pytest.raises(Interrupted):
        train(made)
    train(task(tmp_path, track=("tensorboard",), track_every_steps=1))
    found = read(tmp_path)
    assert [step for step, _ in found["net/step/loss"]] == list(range(1, 3 * STEPS + 1))
    assert [step for step, _ in found["net/loss"]] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_a_tracker_that_is_not_installed_is_one_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    events: list[Event] = []
    train(task(tmp_path, track=("wandb", "tensorboard"), track_every_steps=1), events.append)
    (text,) = notices(events)
    assert "wandb" in text
    assert "pip install 'comkd[wandb]'" in text
    assert len(read(tmp_path)["net/loss"]) == 3


def test_a_tracker_that_fails_later_is_one_notice_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, **settings: Any) -> None:
            self.logged = 0

        def log(self, values: dict[str, float], step: int) -> None:
            self.logged += 1
            if self.logged > 1:
                raise ConnectionError("the service is down")

        def finish(self) -> None:
            raise AssertionError("it was dropped")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Failing)
    events: list[Event] = []
    history = train(task(tmp_path, track=("mlflow",)), events.append)
    assert len(history) == sum(isinstance(event, Epoch) for event in events) == 3
    (text,) = notices(events)
    assert "mlflow" in text
    assert "the service is down" in text


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_with_a_service_gets_the_run_its_figures_and_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    def log(values: dict[str, float], **more: Any) -> None:
        calls.append(("log", {**values, **more}))

    run = SimpleNamespace(log=log, finish=lambda: calls.append(("finish", None)))

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(("init", settings))
        return run

    module = ModuleType(name)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "digits/pets/seed1"
    train(task(folder, track=(name,)))
    kinds = [kind for kind, _ in calls]
    assert kinds == ["init", "log", "log", "log", "finish"]
    assert (calls[0][1]["project"], calls[0][1]["name"]) == ("comkd", "digits/pets/seed1")
    assert [values["step"] for kind, values in calls if kind == "log"] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert all(values["net/loss"] > 0 for kind, values in calls if kind == "log")


def test_other_processes_send_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comkd_cli.training.tracking.ranks.is_main", lambda: False)
    from comkd_cli.training.tracking import Tracking

    sent = Tracking(task(tmp_path, track=("tensorboard",), track_every_steps=1), 0, lambda event: None)
    sent.epoch(1, {"loss": 1.0})
    sent.finish()
    assert not (tmp_path / "tensorboard").exists()
