from pathlib import Path

import pytest
import torch

from comkd_cli.errors import CheckpointError, Interrupted
from comkd_cli.recipe.identity import Identity
from comkd_cli.training.checkpoint import STATE_FORMAT, checkpoint_file, delete_checkpoint, has_checkpoint
from tests.training.test_loop import stop_after_steps, task, train


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped, whose identity is `name: a`."""
    with monkeypatch.context() as patch:
        stop_after_steps(patch, 2)
        with pytest.raises(Interrupted):
            train(task(tmp_path))
    return tmp_path


def test_the_checkpoint_of_another_run_is_refused(stopped: Path) -> None:
    other = Identity({"name": "b"})
    for refused in (lambda: train(task(stopped, identity=other)), lambda: has_checkpoint(stopped, other)):
        with pytest.raises(CheckpointError) as caught:
            refused()
        assert caught.value.path == checkpoint_file(stopped)
        assert caught.value.found == "name: a in this checkpoint, b now"
        assert "--fresh" in str(caught.value.remedy)
    delete_checkpoint(stopped)
    assert not has_checkpoint(stopped, other)
    train(task(stopped, identity=other))


def test_a_damaged_checkpoint_is_named(stopped: Path) -> None:
    checkpoint_file(stopped).write_bytes(b"PK\x03\x04 but not really")
    with pytest.raises(CheckpointError) as caught:
        train(task(stopped))
    assert caught.value.path == checkpoint_file(stopped)
    assert str(stopped / "state") in str(caught.value.remedy)


@pytest.mark.parametrize(("found", "remedy"), [("comkd-state/99", "upgrade comkd"), ("comkd-state/3", "to start from")])
def test_the_checkpoint_of_another_version_is_refused(stopped: Path, found: str, remedy: str) -> None:
    path = checkpoint_file(stopped)
    torch.save({**torch.load(path, weights_only=True), "format": found}, path)
    with pytest.raises(CheckpointError) as caught:
        train(task(stopped))
    assert (caught.value.path, caught.value.found, caught.value.allowed) == (path, found, [STATE_FORMAT])
    assert str(caught.value.remedy).startswith(remedy)


def test_a_checkpoint_of_other_tensors_is_refused(stopped: Path) -> None:
    path = checkpoint_file(stopped)
    state = torch.load(path, weights_only=True)
    state["model"].popitem()
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="holds other tensors"):
        train(task(stopped))
