import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comkd_cli.runtime import ranks
from comkd_cli.runtime.global_batch import batch_moments
from tests import together


def test_alone_the_moments_are_those_of_the_batch() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    mean, variance = batch_moments(values)
    assert mean.tolist() == [2, 4]
    assert variance.tolist() == [1, 4]


def test_the_moments_of_unequal_parts_take_one_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    values = 1000 + torch.randn(7, 3, 2, dtype=torch.float64)
    parts, exchanged = values.split([5, 2]), []

    def moments_of(rank: int, other: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        def all_reduce(table: torch.Tensor) -> None:
            exchanged.append(table.clone())
            if other is not None:
                table += other

        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        return batch_moments(parts[rank], (0, 2))

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    moments_of(1, None)  # for what the other process sends
    mean, variance = moments_of(0, exchanged[0])
    assert len(exchanged) == 2  # one of each process
    torch.testing.assert_close(mean, values.mean((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, values.var((0, 2), correction=0), rtol=1e-10, atol=0)


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    """What `shared_step` printed, by case."""
    ended = together.run(2, module="tests.method.shared_step", cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("share", ["equal", "unequal"])
@pytest.mark.parametrize(
    ("tower", "batch_norms", "tolerance"),
    # Rounding adds up over the batch norms of the deeper towers.
    [("vit", 1, 1e-5), ("resnet", 16, 3e-5), ("efficientnet", 14, 3e-5)],
)
def test_two_processes_make_the_step_of_one(
    steps: dict[str, dict[str, Any]], tower: str, batch_norms: int, tolerance: float, share: str
) -> None:
    found = steps[f"{tower}, {share}"]
    assert found["batch_norms"] == batch_norms
    assert found["loss"] < 1e-5
    assert found["gradient"] < tolerance
    assert found["statistics"] < 1e-6


def test_the_reference_itself_tells_batches_apart() -> None:
    """Half a batch has other statistics: the comparison above could fail."""
    norm = nn.BatchNorm1d(3)
    values = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(norm(values)[:8], norm(values[:8]), atol=1e-3)
