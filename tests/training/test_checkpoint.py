import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from comkd_cli.data.loaders import Batch
from comkd_cli.errors import CheckpointError, Interrupted
from comkd_cli.events import Event, Notice
from comkd_cli.recipe.identity import Identity
from comkd_cli.training.checkpoint import checkpoint_file, delete_checkpoint, has_checkpoint
from comkd_cli.training.state_files import STATE_FORMAT, digest_of
from comkd_cli.training.task import StepResult
from tests.training.test_loop import CrossEntropy, same, stop_after_steps, task, train


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
    del state["sha256"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="holds different tensors"):
        train(task(stopped))


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing is saved."""


class KilledAt(CrossEntropy):
    def __init__(self, step: int) -> None:
        self.left = step

    def loss(self, model: nn.Module, batch: Batch, probe: bool) -> StepResult:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().loss(model, batch, probe)


def kill(folder: Path, step: int, **changes: object) -> None:
    """A run that saves a checkpoint after every step and is killed in a step, counted from 0."""
    with pytest.raises(Killed):
        train(task(folder, objective=KilledAt(step), checkpoint_every_minutes=0.0, **changes))


def position(path: Path) -> tuple[int, int]:
    state = torch.load(path, weights_only=True)
    return state["epoch"], state["step"]


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_killed_within_an_epoch_ends_with_the_same_bits_from_its_last_checkpoint(
    tmp_path: Path, step: int
) -> None:
    whole = task(tmp_path / "whole", ema_decay=0.9)
    history = train(whole)
    kill(tmp_path / "killed", step, ema_decay=0.9)
    state = tmp_path / "killed" / "state"
    assert [position(state / name) for name in ("state.pt", "previous.pt")] == [divmod(step, 3), divmod(step - 1, 3)]
    assert {path.name for path in state.iterdir()} == {"state.pt", "previous.pt"}
    resumed = task(tmp_path / "killed", ema_decay=0.9)
    assert train(resumed) == history
    assert same(whole.model, resumed.model)


def test_within_the_interval_no_checkpoint_is_saved(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(task(tmp_path, objective=KilledAt(2), checkpoint_every_minutes=10.0))
    assert not (tmp_path / "state").exists()


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(4096) + content[middle + 4096 :]


def flipped(content: bytes) -> bytes:
    """One bit of a weight is another one, which no parser notices."""
    tensor = torch.load(io.BytesIO(content), weights_only=True)["model"]["layers.0.weight"].numpy().tobytes()
    place = content.index(tensor) + 1000
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [truncated, zeroed, flipped])
def test_the_checkpoint_before_is_used_where_the_newest_is_damaged(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    whole = task(tmp_path / "whole")
    train(whole)
    kill(tmp_path / "killed", 5)
    newest, before = checkpoint_file(tmp_path / "killed"), tmp_path / "killed/state/previous.pt"
    kept = before.read_bytes()
    newest.write_bytes(damage(newest.read_bytes()))
    events: list[Event] = []
    with pytest.raises(Killed):
        train(task(tmp_path / "killed", objective=KilledAt(0)), events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices[0].startswith(f"{newest}: is damaged (")
    assert notices[1] == "resuming from epoch 2, step 2"
    assert not newest.exists()
    assert before.read_bytes() == kept
    resumed = task(tmp_path / "killed")
    train(resumed)
    assert same(whole.model, resumed.model)


def test_where_both_are_damaged_the_newest_is_named(tmp_path: Path) -> None:
    kill(tmp_path, 3)
    for name in ("state.pt", "previous.pt"):
        (tmp_path / "state" / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError) as caught:
        train(task(tmp_path))
    assert caught.value.path == checkpoint_file(tmp_path)


@pytest.mark.parametrize("renamed", [1, 2])
def test_a_kill_between_the_files_of_a_save_leaves_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    """Saving renames the file that was written, then the newest, then the new one."""
    whole = task(tmp_path / "whole")
    train(whole)
    kill(tmp_path / "killed", 3)
    replace, renames = Path.replace, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal renames
        if self.parent.name == "state":
            renames += 1
            if renames > renamed:
                raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            train(task(tmp_path / "killed", checkpoint_every_minutes=0.0))
    assert position(tmp_path / "killed/state/next.pt") == (1, 1)
    resumed = task(tmp_path / "killed")
    train(resumed)
    assert same(whole.model, resumed.model)


def test_a_checkpoint_of_a_version_without_digests_and_counts_is_resumed(stopped: Path, tmp_path: Path) -> None:
    whole = task(tmp_path / "whole")
    train(whole)
    path = checkpoint_file(stopped)
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if name not in ("sha256", "overflows")}, path)
    resumed = task(stopped)
    train(resumed)
    assert same(whole.model, resumed.model)


def test_a_digest_depends_on_every_name_type_shape_and_byte() -> None:
    base = {"a": torch.arange(6.0), "b": [1, (2.5, None)], "c": {0: torch.tensor(1)}}
    others = [
        {**base, "a": torch.arange(6.0).reshape(2, 3)},
        {**base, "a": torch.arange(6.0).double()},
        {**base, "a": torch.arange(6.0).neg()},
        {**base, "b": [1, (2.5,), None]},
        {**base, "c": {1: torch.tensor(1)}},
        {"A" if name == "a" else name: value for name, value in base.items()},
    ]
    digests = [digest_of(each) for each in (base, *others)]
    assert len(set(digests)) == len(digests)
    stream = io.BytesIO()
    torch.save(base, stream)
    assert digest_of(torch.load(io.BytesIO(stream.getvalue()), weights_only=True)) == digests[0]
