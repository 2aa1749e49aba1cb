"""Runs that are started at the same moment, in processes of their own."""

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from tests import tiny, warm

pytestmark = pytest.mark.slow
SEEDS = range(1, 5)


def write_recipe(path: Path, **changes: object) -> None:
    with path.open("w") as stream:
        YAML(typ="safe", pure=True).dump(tiny.recipe(**changes), stream)


def tensors(runs: Path) -> dict[str, torch.Tensor]:
    """The tensors of the teacher and of every student, by file and name."""
    (teacher,) = runs.glob("teachers/*/teacher.pt")
    files = {"teacher": teacher} | {f"seed{k}": runs / f"small/digits/seed{k}/student.pt" for k in SEEDS}
    return {
        f"{file}/{name}": value
        for file, path in files.items()
        for name, value in torch.load(path, weights_only=True)["state_dict"].items()
    }


@pytest.mark.parametrize("cache", [None, {"views": 1, "dtype": "fp32"}])
def test_four_seeds_started_together_end_as_four_started_in_turn(tmp_path: Path, cache: object) -> None:
    write_recipe(tmp_path / "small.yaml", teacher_cache=cache)
    for seed in SEEDS:
        done = warm.run("distill", "small.yaml", "--seed", seed, "--runs", "in_turn", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    started = [
        warm.Process("distill", "small.yaml", "--seed", seed, "--runs", "together", cwd=tmp_path) for seed in SEEDS
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, said
    assert sum("teacher saved in" in text for text in said) == 1
    in_turn, together = tensors(tmp_path / "in_turn"), tensors(tmp_path / "together")
    assert in_turn.keys() == together.keys()
    assert [name for name, value in in_turn.items() if not torch.equal(value, together[name])] == []
    left = [path for path in (tmp_path / "together").rglob(".*") if path.suffix in (".lock", ".holder")]
    assert left == []


def test_a_second_start_of_a_run_is_refused_and_one_after_a_kill_is_not(tmp_path: Path) -> None:
    write_recipe(tmp_path / "small.yaml", optim={**tiny.OPTIM, "epochs": 1})
    assert warm.run("distill", "small.yaml", cwd=tmp_path).returncode == 0
    more = ("distill", "small.yaml", "--fresh", "--set", "optim.epochs=10000")
    run = tmp_path / "runs/small/digits/seed1"
    lines = (run / "metrics.jsonl").read_text()
    with warm.Process(*more, cwd=tmp_path) as first:
        try:
            while (run / "metrics.jsonl").read_text() == lines:
                assert first.poll() is None
            second = warm.run(*more, cwd=tmp_path)
            assert second.returncode == 1
            assert f"another process is writing it: pid {first.pid} on " in " ".join(second.stderr.split())
        finally:
            first.kill()
    resumed = warm.run("distill", "small.yaml", "--fresh", "--set", "optim.epochs=1", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
