import pytest
import torch

from comkd_cli.errors import TrainingError
from comkd_cli.runtime.devices import failures_explained, to_device


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes", "lower the batch size"),
        (
            "DataLoader worker (pid 7) is killed by signal: Killed.",
            "a process that decodes images died.*data.workers=0",
        ),
        ("Pin memory thread exited unexpectedly", "a process that decodes images died"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "a process that decodes images died"),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_7_1_0>",
            "not enough shared memory.*torch_7_1_0.*data.workers=0",
        ),
        (
            "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:9",
            "another process of this run ended",
        ),
    ],
)
def test_failures_of_the_machine_have_a_remedy(said: str, told: str) -> None:
    with pytest.raises(TrainingError, match=told), failures_explained():
        raise RuntimeError(said)


def test_what_a_worker_raised_is_not_taken_for_its_death() -> None:
    said = "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: a bug"
    with pytest.raises(RuntimeError, match="a bug"), failures_explained():
        raise RuntimeError(said)


def test_torch_compile_that_fails_says_what_to_do() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    with pytest.raises(TrainingError, match="leave `compile` off"), failures_explained():
        raise InvalidCxxCompiler


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="a bug"), failures_explained():
        raise RuntimeError("a bug")


def test_to_a_cpu_nothing_is_copied() -> None:
    tensor = torch.zeros(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
