import resource

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from comkd_cli.errors import TrainingError
from comkd_cli.runtime.devices import failures_explained, to_device


def test_memory_that_torch_cannot_get_is_an_error_with_the_callers_remedy() -> None:
    with pytest.raises(TrainingError) as caught, failures_explained("buy more"):
        torch.empty(2**60, dtype=torch.uint8)
    assert (caught.value.problem, caught.value.remedy) == ("out of memory", "buy more")
    assert "memory" in str(caught.value.found)


def test_memory_that_python_cannot_get_is_an_error_with_a_remedy() -> None:
    with pytest.raises(TrainingError) as caught, failures_explained():
        bytearray(2**62)
    assert caught.value.problem == "out of memory"
    assert "lower the batch size" in str(caught.value.remedy)


class Images(Dataset[torch.Tensor]):
    """Tensors that a worker makes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(10_000)


class Faulty(Images):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise RuntimeError("a bug")


def allow_small_files(_worker: int) -> None:
    """A file of shared memory cannot be larger: torch meets the same where /dev/shm is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_shared_memory_that_is_short_is_an_error_with_a_remedy() -> None:
    with pytest.raises(TrainingError) as caught, failures_explained():
        list(DataLoader(Images(), num_workers=1, worker_init_fn=allow_small_files))
    assert caught.value.field == "data.workers"
    assert "shared memory" in caught.value.problem
    assert "/torch_" in str(caught.value.found)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_what_a_worker_raised_is_not_taken_for_its_death() -> None:
    with pytest.raises(RuntimeError, match="a bug"), failures_explained():
        list(DataLoader(Faulty(), num_workers=1))


def test_torch_compile_that_fails_names_the_field() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    with pytest.raises(TrainingError) as caught, failures_explained():
        raise InvalidCxxCompiler
    assert caught.value.field == "compile"


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="a bug"), failures_explained():
        raise RuntimeError("a bug")


def test_to_a_cpu_nothing_is_copied() -> None:
    tensor = torch.zeros(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
